"""Where each rank's share of every trainable parameter lies in the optimizer's flat float32 tensors.

ZeRO concatenates parameters into flat tensors and cuts those over the ranks: stages 1 and 2 cut each group as a whole,
stage 3 cuts each parameter. A `Piece` hides the difference; masters and moments are laid out alike, because the
optimizer's state has the flat tensor's shape. DeepSpeed's own accessors are not used: its stage-3 setter fails on the
last rank where a parameter does not divide evenly, and its stage-1 and -2 state is unlinked before the first step and
for every group but the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A run of elements of one parameter that one rank owns.

    Attributes:
        name: of the parameter.
        flat: index of the flat tensor.
        flat_start: first element in the flat tensor of that rank.
        param_start: first element in the flattened parameter.
        num_elements: length of the run.
    """

    name: str
    flat: int
    flat_start: int
    param_start: int
    num_elements: int


def full_shape(parameter: Tensor) -> torch.Size:
    """Shape of the whole parameter; under ZeRO-3 the tensor itself has shape (0,) while it is partitioned."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def is_bf16_optimizer(zero_optimizer: Any) -> bool:
    """Whether DeepSpeed chose its `BF16_Optimizer`, as it does for stage 1 in bfloat16; else it is a ZeRO optimizer."""
    return hasattr(zero_optimizer, "bf16_groups")


class Partitions:
    """The layout of DeepSpeed's ZeRO optimizer: what every rank owns, without asking it.

    Args:
        zero_optimizer: of the DeepSpeed engine.
        stage: 0 to 3; at stage 0 every rank owns everything.
        names: `id(parameter)` -> name, of the trainable parameters.
    """

    def __init__(self, zero_optimizer: Any, stage: int, names: Mapping[int, str]) -> None:
        self._zero = zero_optimizer
        self._stage = stage
        self._names = names
        if stage == 0:
            groups = zero_optimizer.groups
        elif stage == 3:
            groups = zero_optimizer.fp16_groups
        elif is_bf16_optimizer(zero_optimizer):
            groups = zero_optimizer.bf16_groups
        else:
            groups = zero_optimizer.round_robin_bit16_groups
        self._groups: Sequence[Sequence[Any]] = groups
        self.shapes = {
            self._names[id(parameter)]: full_shape(parameter) for group in self._groups for parameter in group
        }
        missing = sorted(set(names.values()) - set(self.shapes))
        assert not missing, f"parameters without a place in the optimizer: {missing[:3]}"

    @property
    def flats(self) -> Sequence[Tensor]:
        """This rank's flat float32 masters, which are also the keys of the optimizer's state."""
        if self._stage == 0:
            return self._zero.flats  # type: ignore[no-any-return]
        if self._stage == 3:
            return self._zero.fp32_partitioned_groups_flat  # type: ignore[no-any-return]
        if is_bf16_optimizer(self._zero):
            return self._zero.fp32_groups_flat_partition  # type: ignore[no-any-return]
        return self._zero.single_partition_of_fp32_groups  # type: ignore[no-any-return]

    def pieces(self, rank: int) -> list[Piece]:
        """What a rank owns, in the order of its flat tensors; padding is left out."""
        if self._stage == 0:
            return list(self._stage_0())
        return list(self._stage_3(rank) if self._stage == 3 else self._stage_1_2(rank))

    @property
    def is_replicated(self) -> bool:
        """Whether each rank owns everything."""
        return self._stage == 0

    def _stage_0(self) -> Iterator[Piece]:
        """Each group is concatenated."""
        for flat, group in enumerate(self._groups):
            start = 0
            for parameter in group:
                yield Piece(self._names[id(parameter)], flat, start, 0, parameter.numel())
                start += parameter.numel()

    def _stage_1_2(self, rank: int) -> Iterator[Piece]:
        """Each group is concatenated (with padding between and behind), then cut into equal parts, one per rank."""
        for flat, group in enumerate(self._groups):
            size = self.flats[flat].numel()
            offset = rank * size
            if is_bf16_optimizer(self._zero):
                starts = [0, *accumulate(parameter.numel() for parameter in group)][: len(group)]
            else:
                starts = self._zero.round_robin_bit16_offsets[flat]
            for parameter, start in zip(group, starts, strict=True):
                first = max(start, offset)
                last = min(start + parameter.numel(), offset + size)
                if first < last:
                    yield Piece(self._names[id(parameter)], flat, first - offset, first - start, last - first)

    def _stage_3(self, rank: int) -> Iterator[Piece]:
        """Each parameter is cut into equal parts, one per rank; the parts of one rank are concatenated."""
        for flat, group in enumerate(self._groups):
            start = 0
            for parameter in group:
                size = parameter.partition_numel()
                # The last ranks may own padding only.
                num_elements = min(size, full_shape(parameter).numel() - rank * size)
                if num_elements > 0:
                    yield Piece(self._names[id(parameter)], flat, start, rank * size, num_elements)
                start += size
