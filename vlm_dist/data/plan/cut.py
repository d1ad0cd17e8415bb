"""Cutting a step into padded micro-batches, and dealing micro-batches to ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.types import Layout

T = TypeVar("T")

#: Numbers of the samples of one micro-batch; None is a slot without a sample.
Slots = list[int | None]


def cut_padded(samples: Sequence[int], keys: NDArray[np.int64] | None, size: int, num_slots: int) -> list[Slots]:
    """Cut samples into micro-batches of `size`, in the order given.

    Args:
        samples: numbers of the samples, in the order of their slots.
        keys: batch key of each number; a micro-batch has one key. None: they all mix.
        size: samples per micro-batch, at most.
        num_slots: at least so many slots; those beyond the samples are empty.
    """
    by_key: dict[int, list[int]] = {}
    for sample in samples:
        by_key.setdefault(0 if keys is None else int(keys[sample]), []).append(sample)
    cut: list[Slots] = [list(some[i : i + size]) for some in by_key.values() for i in range(0, len(some), size)]
    cut.sort(key=lambda slots: min(slot for slot in slots if slot is not None))
    num_empty = num_slots - len(samples)
    for slots in cut:
        added = min(size - len(slots), max(num_empty, 0))
        slots += [None] * added
        num_empty -= added
    cut += [[None] * min(size, num_empty - i) for i in range(0, num_empty, size)]
    return cut


def share_among_nodes(node: NDArray[np.int64], num_nodes: int, num_slots: int) -> list[list[int]]:
    """Give each node the samples of its groups, and no node more than its share of the slots.

    A step has equally many samples of every group, give or take one: what a node has too many is moved, since one
    sample more than fits would cost all ranks one micro-batch more.

    Args:
        node: [N] whose group each sample is of.
        num_nodes: divides `num_slots`.
        num_slots: of the step.

    Returns:
        Per node, numbers of the samples, ascending.
    """
    share = num_slots // num_nodes
    own = [np.flatnonzero(node == number).tolist() for number in range(num_nodes)]
    surplus = sorted(sample for samples in own for sample in samples[share:])
    shares = [samples[:share] for samples in own]
    for samples in shares:
        taken = share - len(samples)
        samples += surplus[:taken]
        surplus = surplus[taken:]
    return [sorted(samples) for samples in shares]


def rows_per_node(cut: Sequence[Sequence[Slots]], ranks_per_node: int) -> list[list[Slots]]:
    """Lay the micro-batches of each node out for its ranks: [M][W], the same M for all; what is missing is empty.

    Every other row runs backwards within a node, so that no rank always has the longest.
    """
    num_rows = max(-(-len(batches) // ranks_per_node) for batches in cut)
    rows: list[list[Slots]] = []
    for row in range(num_rows):
        ranks: list[Slots] = []
        for batches in cut:
            mine = list(batches[row * ranks_per_node : (row + 1) * ranks_per_node])
            mine += [[] for _ in range(ranks_per_node - len(mine))]
            ranks += mine if row % 2 == 0 else mine[::-1]
        rows.append(ranks)
    return rows


def in_dealing_order(rows: Sequence[Sequence[T]]) -> list[T]:
    """Put rows [M][W] into the one list from which `StepPlan.for_rank` deals: every other row is dealt backwards."""
    return [one for number, row in enumerate(rows) for one in (row if number % 2 == 0 else reversed(row))]


def nodes_of(layout: Layout, num_groups: int) -> int | str:
    """In how many nodes the groups can be dealt, in contiguous runs; else why they cannot, in words."""
    if not layout.ranks_per_node:
        return "not all nodes have equally many ranks, numbered node by node"
    if layout.world_size % layout.ranks_per_node:
        return f"{layout.world_size} ranks are no multiple of {layout.ranks_per_node} ranks per node"
    num_nodes = layout.world_size // layout.ranks_per_node
    if num_groups % num_nodes:
        return f"{num_nodes} nodes do not divide the run's {num_groups} groups of shards"
    return num_nodes
