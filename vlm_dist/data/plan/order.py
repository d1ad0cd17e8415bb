"""The order of samples, as pure functions of (seed, pass or epoch, sample): no state, no random generator.

Two levels, so that a billion samples cost no memory and each part of the stream stays on few shards:

1. The shards of a source are permuted for every pass over it; their samples in that order are the pass's *stream*.
2. What an epoch takes of each stream is cut into C canonical groups; a (source, group) is a *cell*. A *window* takes
   its fair share of every cell, and is permuted, or grouped by length, in memory (`windows.py`).

Permutations are sorts by an integer hash, ties by the sample's number.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.plan.hashing import hash_rows, hash_words

#: Changes whenever the same settings would give another order: part of the plan's digest.
ORDER_VERSION = 2

# what a hash is for, so that no two uses share a sequence
_SHARDS, _ROTATION, _SAMPLES = 1, 2, 3


@dataclass(frozen=True, eq=False)
class SourceShape:
    """What the order needs to know of a source; compared by identity, as it may have 10^5 shards."""

    shard_sizes: tuple[int, ...]  # samples per shard
    num_epoch_samples: int  # floor(repeat x samples)

    @cached_property
    def num_samples(self) -> int:
        """Samples of the source."""
        return sum(self.shard_sizes)


class PassOrder:
    """The stream of one pass over a source: position -> row.

    Args:
        shard_sizes: samples per shard.
        seed: of the run.
        source: position of the source in the run.
        number: of the pass since the start of the run.
        shuffle: False leaves shards and rows as they are.
    """

    def __init__(self, shard_sizes: tuple[int, ...], seed: int, source: int, number: int, shuffle: bool) -> None:
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        first_rows = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        self._total = int(sizes.sum())
        self._shift = 0
        order = np.arange(len(sizes))
        if shuffle:
            keys = hash_rows(hash_words(seed, number, source, _SHARDS), np.arange(len(sizes), dtype=np.int64))
            order = np.argsort(keys, kind="stable")
            # where few shards make few orders, passes still begin at different samples
            self._shift = hash_words(seed, number, source, _ROTATION) % max(self._total, 1)
        self._ends = np.cumsum(sizes[order])
        self._first_rows = first_rows[order] - (self._ends - sizes[order])

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the rows at positions start to stop of the stream."""
        positions = (np.arange(start, stop, dtype=np.int64) + self._shift) % max(self._total, 1)
        return positions + self._first_rows[np.searchsorted(self._ends, positions, side="right")]


@lru_cache(maxsize=64)
def pass_order(shape: SourceShape, seed: int, source: int, number: int, shuffle: bool) -> PassOrder:
    """Return a pass's order; the last ones are kept."""
    return PassOrder(shape.shard_sizes, seed, source, number, shuffle)


@dataclass(frozen=True)
class Samples:
    """Some slots of an epoch, as columns. N samples."""

    source: NDArray[np.int32]
    row: NDArray[np.int64]
    repeat: NDArray[np.int32]  # which pass of the epoch
    group: NDArray[np.int32]
    key: NDArray[np.uint64]  # hash of (seed, pass, source, row)

    def __len__(self) -> int:
        return len(self.row)

    def take(self, chosen: NDArray[np.int64]) -> Samples:
        """Return the chosen samples, in that order."""
        return Samples(self.source[chosen], self.row[chosen], self.repeat[chosen], self.group[chosen], self.key[chosen])


class EpochOrder:
    """What an epoch takes of each source, and how it is cut into windows.

    A source's stream goes on where the epoch before stopped: with `repeat: 0.5` two epochs cover the source once.

    Args:
        shapes: of the sources.
        seed: of the run.
        epoch: number of the epoch.
        groups: C; 1 where the order is fixed.
        shuffle: False: the sources one after the other, as they are.
    """

    def __init__(self, shapes: Sequence[SourceShape], seed: int, epoch: int, groups: int, shuffle: bool) -> None:
        self._shapes = shapes
        self._seed = seed
        self._epoch = epoch
        self._groups = groups if shuffle else 1
        self._shuffle = shuffle
        self._cells = [
            self._cell_parts(source, group) for source in range(len(shapes)) for group in range(self._groups)
        ]
        self._cell_sizes = [sum(stop - start for _, start, stop in parts) for parts in self._cells]
        self.num_samples = sum(self._cell_sizes)

    def _cell_parts(self, source: int, group: int) -> list[tuple[int, int, int]]:
        """List (pass, start, stop) of a cell: its slice of the stream of every pass that the epoch touches."""
        shape = self._shapes[source]
        start, stop = (epoch * shape.num_epoch_samples for epoch in (self._epoch, self._epoch + 1))
        parts = []
        total = shape.num_samples
        for number in range(start // total, -(-stop // total)) if stop > start else ():
            first, last = max(start - number * total, 0), min(stop - number * total, total)
            cut = [first + (last - first) * c // self._groups for c in (group, group + 1)]
            parts.append((number, cut[0], cut[1]))
        return parts

    def window(self, start: int, stop: int) -> Samples:
        """Return samples start to stop of the epoch: of every cell its share, in the order of the cells."""
        if self._shuffle:
            ranges = list(zip(shares(self._cell_sizes, start), shares(self._cell_sizes, stop), strict=True))
        else:
            ranges, before = [], 0
            for size in self._cell_sizes:
                ranges.append((min(max(start - before, 0), size), min(max(stop - before, 0), size)))
                before += size
        columns: list[tuple[NDArray[Any], ...]] = []
        for cell, (first, last) in enumerate(ranges):
            source, group = divmod(cell, self._groups)
            columns.extend(self._cell_rows(source, group, self._cells[cell], first, last))
        if not columns:
            none = np.zeros(0, dtype=np.int64)
            few = none.astype(np.int32)
            return Samples(few, none, few, few, none.astype(np.uint64))
        source_column, row, repeat, group_column, key = (np.concatenate(parts) for parts in zip(*columns, strict=True))
        return Samples(source_column, row, repeat, group_column, key)

    def _cell_rows(
        self, source: int, group: int, parts: list[tuple[int, int, int]], first: int, last: int
    ) -> list[tuple[NDArray[Any], ...]]:
        shape = self._shapes[source]
        first_pass = parts[0][0] if parts else 0
        columns: list[tuple[NDArray[Any], ...]] = []
        before = 0
        for number, start, stop in parts:
            low, high = max(first - before, 0), min(last - before, stop - start)
            before += stop - start
            if low >= high:
                continue
            order = pass_order(shape, self._seed, source, number, self._shuffle)
            rows = order.rows(start + low, start + high)
            keys = hash_rows(hash_words(self._seed, number, source, _SAMPLES), rows)
            constants = (np.full(len(rows), value, dtype=np.int32) for value in (source, number - first_pass, group))
            source_column, repeat, group_column = constants
            columns.append((source_column, rows, repeat, group_column, keys))
        return columns


def shares(sizes: Sequence[int], total: int) -> list[int]:
    """Say how many of the first `total` elements of a fair merge come from each cell.

    The merge sorts the elements k of all cells by (2k + 1) / (2 size): every prefix holds each cell in proportion,
    within one element, and a longer prefix never holds fewer of any cell (rounding each share alone would not do).

    Args:
        sizes: of the cells.
        total: length of the prefix.

    Returns:
        One count per cell; their sum is `total`.
    """
    num_elements = sum(sizes)
    if not 0 <= total <= num_elements:
        raise ValueError(f"prefix of {total} elements of {num_elements}")
    if num_elements == 0:
        return [0] * len(sizes)
    # elements with a key up to total / num_elements: a prefix of about the right length
    counts = [(2 * total * size + num_elements) // (2 * num_elements) for size in sizes]
    surplus = sum(counts) - total
    if surplus == 0:
        return counts
    step = -1 if surplus > 0 else 1

    def next_change(cell: int) -> tuple[Fraction, int]:
        """Return the key of the element that this cell would gain or lose next, smallest first."""
        element = counts[cell] if step > 0 else counts[cell] - 1
        return step * Fraction(2 * element + 1, 2 * sizes[cell]), step * cell

    limit = sizes if step > 0 else [0] * len(sizes)
    heap = [next_change(cell) for cell in range(len(sizes)) if counts[cell] != limit[cell]]
    heapq.heapify(heap)
    for _ in range(abs(surplus)):
        cell = step * heapq.heappop(heap)[1]
        counts[cell] += step
        if counts[cell] != limit[cell]:
            heapq.heappush(heap, next_change(cell))
    return counts
