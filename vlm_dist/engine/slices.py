"""A rank's own share of masters and moments, by parameter name: for what no single process can hold.

Collecting needs no collective, since each rank has its share; what travels to rank 0 is the weights alone, rounded to
the dtype that the model computes in, a few parameters at a time. A share can be put back on any ZeRO stage and number
of ranks: each rank reads the elements that it owns now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlm_dist.engine.partitions import Partitions, Piece
from vlm_dist.engine.trainable_state import NamedState

#: Elements that travel to rank 0 in one go; a single larger parameter travels alone.
_CHUNK_ELEMENTS = 64 << 20

#: Gives masters and both moments, float32 [num_elements], of a parameter's name, first element and number of elements.
ReadElements = Callable[[str, int, int], NamedState]


@dataclass(frozen=True)
class ParameterSlice:
    """A run of elements of one flattened parameter.

    Attributes:
        name: of the parameter.
        start: first element.
        state: float32 [num_elements] on the CPU.
    """

    name: str
    start: int
    state: NamedState


@dataclass(frozen=True)
class SlicedState:
    """What one rank saves; see `TrainableState` for what is not explained here.

    Attributes:
        step: number of updates that the optimizer applied.
        slices: this rank's own.
        shapes: of all trainable parameters, whole.
        weights: on rank 0: all of them in the compute dtype; None elsewhere.
        hyperparameters: of the optimizer's groups.
        loss_scaler: float16 only.
    """

    step: int
    slices: Sequence[ParameterSlice]
    shapes: Mapping[str, torch.Size]
    weights: Mapping[str, Tensor] | None
    hyperparameters: list[dict[str, Any]] = field(default_factory=list)
    loss_scaler: dict[str, float] = field(default_factory=dict)


def run_of(flats: Sequence[Tensor], piece: Piece) -> Tensor:
    """The piece's elements in this rank's flat tensors, as a view."""
    return flats[piece.flat].view(-1)[piece.flat_start : piece.flat_start + piece.num_elements]


def cut_slices(partitions: Partitions, rank: int, parts: Sequence[Sequence[Tensor]]) -> list[ParameterSlice]:
    """Copies of what a rank has to save: its own pieces; at stage 0 rank 0 has all of them.

    Args:
        partitions: who owns what.
        rank: this one.
        parts: flat masters, and both moments, laid out alike.
    """
    if partitions.is_replicated and rank != 0:
        return []
    on_cpu = [[flat.to("cpu", torch.float32, copy=True) for flat in flats] for flats in parts]
    return [
        ParameterSlice(piece.name, piece.param_start, NamedState(*(run_of(flats, piece) for flats in on_cpu)))
        for piece in partitions.pieces(rank)
    ]


def fill_slices(partitions: Partitions, rank: int, parts: Sequence[Sequence[Tensor]], read: ReadElements) -> None:
    """Put back what a rank owns."""
    for piece in partitions.pieces(rank):
        state = read(piece.name, piece.param_start, piece.num_elements)
        for flats, values in zip(parts, (state.master, state.exp_avg, state.exp_avg_sq), strict=True):
            run_of(flats, piece).copy_(values)


def gather_weights(
    partitions: Partitions, flats: Sequence[Tensor], dtype: torch.dtype, group: dist.ProcessGroup
) -> dict[str, Tensor] | None:
    """All trainable parameters on rank 0, rounded there where they are; None elsewhere. Collective.

    Args:
        partitions: who owns what.
        flats: this rank's masters.
        dtype: that they are rounded to.
        group: a gloo group of all ranks.

    Returns:
        On rank 0 whole tensors on the CPU by name.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    owners = [0] if partitions.is_replicated else list(range(world_size))
    owned: list[dict[str, list[Piece]]] = []
    for owner in owners:
        by_name: dict[str, list[Piece]] = {}
        for piece in partitions.pieces(owner):
            by_name.setdefault(piece.name, []).append(piece)
        owned.append(by_name)
    weights = {name: torch.empty(shape, dtype=dtype) for name, shape in partitions.shapes.items()} if not rank else None
    for names in _chunks(partitions.shapes):
        pieces = [[piece for name in names for piece in by_name.get(name, ())] for by_name in owned]
        size = max(sum(piece.num_elements for piece in some) for some in pieces)
        sent = torch.empty(size, dtype=dtype)
        if rank < len(owners):
            _pack(sent, ((piece, run_of(flats, piece)) for piece in pieces[rank]))
        received = [sent]
        if len(owners) > 1:
            received = [torch.empty_like(sent) for _ in owners] if rank == 0 else []
            # as bytes: gloo does not know every dtype
            dist.gather(sent.view(torch.uint8), [one.view(torch.uint8) for one in received] or None, dst=0, group=group)
        if weights is not None:
            for some, buffer in zip(pieces, received, strict=True):
                start = 0
                for piece in some:
                    target = weights[piece.name].view(-1)[piece.param_start : piece.param_start + piece.num_elements]
                    target.copy_(buffer[start : start + piece.num_elements])
                    start += piece.num_elements
    return weights


def _pack(buffer: Tensor, runs: Iterator[tuple[Piece, Tensor]]) -> None:
    start = 0
    for piece, run in runs:
        buffer[start : start + piece.num_elements].copy_(run)
        start += piece.num_elements


def _chunks(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    """Names of parameters that travel together."""
    names: list[str] = []
    total = 0
    for name, shape in shapes.items():
        if names and total + shape.numel() > _CHUNK_ELEMENTS:
            yield names
            names, total = [], 0
        names.append(name)
        total += shape.numel()
    if names:
        yield names
