"""Collecting the trainable parameters and the optimizer's moments by name, and putting them back, bit for bit.

Everything travels as float32 over a gloo group of CPU tensors: rank 0 gathers, each other rank sends only what it owns;
where every node keeps a copy, rank 0 then gives the whole to their first ranks.
The layout of every rank is computed, not asked for, so that a state collected from one ZeRO stage and number of ranks
can be restored into another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlm_dist.engine.partitions import Partitions, Piece
from vlm_dist.engine.slices import ParameterSlice, ReadElements, cut_slices, fill_slices, gather_weights, run_of
from vlm_dist.engine.trainable_state import NamedState
from vlm_dist.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
GROUP_HYPERPARAMETERS = ("lr", "initial_lr", "betas", "eps", "weight_decay")


class Resharder:
    """Moves state between the flat tensors of all ranks and whole tensors on rank 0.

    Args:
        partitions: who owns what.
        optimizer: torch's Adam or AdamW, whose parameters are the flat tensors.
        group: a gloo group of all ranks.
    """

    def __init__(self, partitions: Partitions, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup) -> None:
        self.partitions = partitions
        self._optimizer = optimizer
        self._group = group
        self._rank = dist.get_rank(group)
        self._world_size = dist.get_world_size(group)

    def collect(self, holders: Any = None) -> dict[str, NamedState] | None:
        """All parameters on the ranks that hold them, None elsewhere. Collective: every rank calls this.

        Args:
            holders: a gloo group with rank 0 first, or what `dist.new_group` gave those outside; None: rank 0 alone.
        """
        scratch: list[Tensor] = []
        masters = self._gather(self._flats(), holders, scratch)
        moments = [self._gather(self._moment(key), holders, scratch) for key in MOMENTS]
        if masters is None:
            return None
        return {
            name: NamedState(master, *(moment[name] for moment in moments if moment is not None))
            for name, master in masters.items()
        }

    def restore(self, parameters: Mapping[str, NamedState] | None, step: int, source: int = 0) -> None:
        """Fill the masters and the moments of all ranks. Collective: every rank calls this.

        Args:
            parameters: all of them; read on one rank only.
            step: updates that the optimizer has applied.
            source: the rank that has them.

        Raises:
            CheckpointError: on every rank, before anything is changed: the names or shapes are not this model's.
        """
        shapes = None if parameters is None else {name: state.master.shape for name, state in parameters.items()}
        problem = self._misfit(shapes) if self._rank == source else None
        shared = [problem]
        dist.broadcast_object_list(shared, src=source, group=self._group)
        if shared[0] is not None:
            raise CheckpointError(shared[0])
        self.create_moments(step)

        def part(choose: Callable[[NamedState], Tensor]) -> dict[str, Tensor] | None:
            return None if parameters is None else {name: choose(state) for name, state in parameters.items()}

        self._scatter(part(lambda state: state.master), self._flats(), source)
        self._scatter(part(lambda state: state.exp_avg), self._moment("exp_avg"), source)
        self._scatter(part(lambda state: state.exp_avg_sq), self._moment("exp_avg_sq"), source)

    def own_slices(self) -> list[ParameterSlice]:
        """Copies of what this rank has to save, where each saves its own. Local."""
        return cut_slices(self.partitions, self._rank, [self._flats(), *(self._moment(key) for key in MOMENTS)])

    def restore_slices(self, read: ReadElements, shapes: Mapping[str, torch.Size], step: int) -> None:
        """Fill this rank's masters and moments from what it reads itself. Local.

        Args:
            read: gives elements of a parameter.
            shapes: of all parameters that can be read; the same on every rank.
            step: updates that the optimizer has applied.

        Raises:
            CheckpointError: before anything is changed: the names or shapes are not this model's.
        """
        if (problem := self._misfit(shapes)) is not None:
            raise CheckpointError(problem)
        self.create_moments(step)
        fill_slices(self.partitions, self._rank, [self._flats(), *(self._moment(key) for key in MOMENTS)], read)

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor] | None:
        """All parameters in a dtype on rank 0, None elsewhere. Collective: every rank calls this."""
        return gather_weights(self.partitions, self._flats(), dtype, self._group)

    def step(self) -> int:
        """Updates that the optimizer has applied; 0 before the first."""
        steps = {int(state["step"]) for flat in self.partitions.flats if (state := self._optimizer.state.get(flat))}
        assert len(steps) <= 1, f"parameter groups disagree on the number of updates: {steps}"
        return steps.pop() if steps else 0

    def hyperparameters(self) -> list[dict[str, Any]]:
        """Of the optimizer's groups, in order."""
        return [
            {key: group[key] for key in GROUP_HYPERPARAMETERS if key in group} for group in self._optimizer.param_groups
        ]

    @cached_property
    def _largest_share(self) -> int:
        """Elements of the rank that owns most."""
        return max(sum(piece.num_elements for piece in self.partitions.pieces(r)) for r in range(self._world_size))

    def _flats(self) -> list[Tensor]:
        return [flat.detach() for flat in self.partitions.flats]

    def _moment(self, key: str) -> list[Tensor]:
        """One of Adam's moments, laid out like the masters; zeros before the first update."""
        states = [self._optimizer.state.get(flat) for flat in self.partitions.flats]
        return [
            state[key] if state else torch.zeros_like(flat, requires_grad=False)
            for state, flat in zip(states, self.partitions.flats, strict=True)
        ]

    def create_moments(self, step: int) -> None:
        """What AdamW would create in its first step, at the given step."""
        on_device = any(group.get("fused") or group.get("capturable") for group in self._optimizer.param_groups)
        for flat in self.partitions.flats:
            state = self._optimizer.state[flat]
            device = flat.device if on_device else torch.device("cpu")
            # DeepSpeed's CPU Adam counts in a plain integer
            is_torch = isinstance(self._optimizer, torch.optim.Adam)
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device) if is_torch else step
            for key in MOMENTS:
                if key not in state:
                    state[key] = torch.zeros_like(flat, requires_grad=False)

    def _gather(self, flats: list[Tensor], holders: Any, scratch: list[Tensor]) -> dict[str, Tensor] | None:
        """Send this rank's pieces to rank 0, which puts them together, and gives them to the other holders.

        Args:
            flats: of this rank.
            holders: see `collect`.
            scratch: memory for what travels; filled by the first call, for the next ones.
        """
        on_cpu = [flat.to("cpu", torch.float32) for flat in flats]  # one copy from the device for each
        mine = [(piece, run_of(on_cpu, piece)) for piece in self.partitions.pieces(self._rank)]
        if self._world_size > 1 and not self.partitions.is_replicated:
            mine = self._exchange(mine, scratch)
        is_copied = holders is not None and dist.get_rank(holders) >= 0
        if self._rank != 0 and not is_copied:
            return None
        joined = torch.empty(sum(shape.numel() for shape in self.partitions.shapes.values()))
        whole, end = {}, 0
        for name, shape in self.partitions.shapes.items():
            whole[name] = joined[end : end + shape.numel()]
            end += shape.numel()
        if self._rank == 0:
            self._join(mine, whole)
        if is_copied:
            dist.broadcast(joined, src=0, group=holders)
        return {name: tensor.view(self.partitions.shapes[name]) for name, tensor in whole.items()}

    def _exchange(self, mine: list[tuple[Piece, Tensor]], scratch: list[Tensor]) -> list[tuple[Piece, Tensor]]:
        """Send all pieces to rank 0; gives back everybody's there, and nothing elsewhere."""
        if not scratch:
            num_buffers = 1 + (self._world_size if self._rank == 0 else 0)
            scratch += [torch.empty(self._largest_share) for _ in range(num_buffers)]  # gather wants equal sizes
        sent, *received = scratch
        start = 0
        for piece, run in mine:
            sent[start : start + piece.num_elements].copy_(run)
            start += piece.num_elements
        dist.gather(sent, received or None, dst=0, group=self._group)
        found = []
        for rank, buffer in enumerate(received):
            start = 0
            for piece in self.partitions.pieces(rank):
                found.append((piece, buffer[start : start + piece.num_elements]))
                start += piece.num_elements
        return found

    def _join(self, pieces: list[tuple[Piece, Tensor]], whole: Mapping[str, Tensor]) -> None:
        """Put every rank's pieces into the flattened parameters."""
        filled = dict.fromkeys(whole, 0)
        for piece, run in pieces:
            whole[piece.name][piece.param_start : piece.param_start + piece.num_elements].copy_(run)
            filled[piece.name] += piece.num_elements
        for name, tensor in whole.items():
            # An ungathered tensor would have shape (0,) and save without error.
            assert filled[name] == tensor.numel() > 0, f"{name}: got {filled[name]} of {tensor.numel()} elements"

    def _scatter(self, whole: Mapping[str, Tensor] | None, flats: list[Tensor], source: int) -> None:
        """Receive this rank's pieces from one rank, and write them into the flat tensors."""
        received = torch.empty(self._largest_share, dtype=torch.float32)
        buffers = None
        if self._rank == source:
            assert whole is not None
            different = 1 if self.partitions.is_replicated else self._world_size
            buffers = [torch.zeros_like(received) for _ in range(different)]
            for rank, buffer in enumerate(buffers):
                start = 0
                for piece in self.partitions.pieces(rank):
                    taken = whole[piece.name].reshape(-1)[piece.param_start : piece.param_start + piece.num_elements]
                    buffer[start : start + piece.num_elements].copy_(taken)
                    start += piece.num_elements
        if self.partitions.is_replicated:
            received = received if buffers is None else buffers[0]
            dist.broadcast(received, src=source, group=self._group)
        else:
            dist.scatter(received, buffers, src=source, group=self._group)
        start = 0
        for piece in self.partitions.pieces(self._rank):
            run_of(flats, piece).copy_(received[start : start + piece.num_elements])
            start += piece.num_elements

    def _misfit(self, found: Mapping[str, torch.Size] | None) -> str | None:
        """Why a state with parameters of these shapes cannot be restored into this model; None if it can."""
        if found is None:
            return "there is no trainable state to restore"
        shapes = self.partitions.shapes
        missing = sorted(set(shapes) - set(found))
        unexpected = sorted(set(found) - set(shapes))
        differing = [
            f"{name}: {tuple(found[name])} in the checkpoint, {tuple(shape)} in the model"
            for name, shape in shapes.items()
            if name in found and found[name] != shape
        ]
        reasons = []
        if missing:
            reasons.append(f"{len(missing)} trainable parameters are not in it, e.g. {missing[0]}")
        if unexpected:
            reasons.append(f"{len(unexpected)} of its parameters are not trainable here, e.g. {unexpected[0]}")
        if differing:
            reasons.append(f"{len(differing)} shapes differ, e.g. {differing[0]}")
        if not reasons:
            return None
        return (
            "the checkpoint does not fit the model: "
            + "; ".join(reasons)
            + ". Was peft_config.yaml (r, target_modules, "
            "tower policy) or the model changed? Use the checkpoint's resolved_config.yaml, or a new output_dir."
        )
