"""What the sources share: names, columns and numbered rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.sources.columns import ColumnNames
from vlm_dist.data.sources.media import MediaColumns
from vlm_dist.data.types import RawSample, SampleOrigin

ROWS_PER_BLOCK = 256


class Rows:
    """The part of a source that does not depend on where its rows come from.

    Args:
        name: of the source, for people.
        columns: of its rows.
        num_rows: how many there are.
        manifest_hash: changes when the data does.
    """

    def __init__(self, name: str, columns: ColumnNames, num_rows: int, manifest_hash: str) -> None:
        self.name = name
        self._columns = columns
        self._num_rows = num_rows
        self._hash = manifest_hash

    def declare_columns(self, wanted: Collection[str]) -> None:
        """Add the columns among these that are alternatives, such as `jpg;png`."""
        self._columns.declare(wanted)

    def keep_columns(self, used: Collection[str]) -> None:
        """Read no column but these, where that saves something."""
        self._columns.keep(used)

    def __len__(self) -> int:
        return self._num_rows

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the data (of tars: member extensions and the fields of their JSON), renamed."""
        return self._columns.names

    @property
    def manifest_hash(self) -> str:
        """Hex digest that changes when the data does, but not when it is moved."""
        return self._hash

    def _check(self, row: int) -> None:
        if not 0 <= row < self._num_rows:
            raise IndexError(f"{self.name}: row {row} of {self._num_rows}")


class BlockRows(Rows):
    """Rows of which any is as cheap to read as the next: cut into small blocks, so that few files give many orders.

    Args:
        name: of the source, for people.
        columns: of its rows.
        num_rows: how many there are.
        manifest_hash: changes when the data does.
        media: reads the media columns.
        media_names: the media columns, by their own names.
    """

    def __init__(
        self,
        name: str,
        columns: ColumnNames,
        num_rows: int,
        manifest_hash: str,
        media: MediaColumns,
        media_names: Collection[str],
    ) -> None:
        super().__init__(name, columns, num_rows, manifest_hash)
        self._media = media
        self._media_names = frozenset(media_names)

    def keep_columns(self, used: Collection[str]) -> None:
        """Read no media but those of these columns."""
        super().keep_columns(used)
        self._media_names = frozenset(name for name in self._media_names if self._columns.is_kept(name))

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Number of rows per block."""
        return [min(ROWS_PER_BLOCK, len(self) - start) for start in range(0, len(self), ROWS_PER_BLOCK)]

    @property
    def shard_digests(self) -> Sequence[str]:
        """One digest per block of rows."""
        return [f"{self._hash}-{block}" for block in range(-(-len(self) // ROWS_PER_BLOCK))]

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find the block of each row, and its row within the block."""
        blocks, within = np.divmod(np.asarray(rows, dtype=np.int64), ROWS_PER_BLOCK)
        return blocks, within

    def will_read(self, rows: NDArray[np.int64]) -> None:
        """Nothing to do: tables are mapped into memory, and records name their media only when they are read."""

    def _sample(self, row: dict[str, Any], origin: SampleOrigin) -> RawSample:
        return RawSample(self._columns.apply(self._media.load(self._media_names, row)), origin)


def limited_sizes(sizes: Sequence[int], max_samples: int | None) -> list[int]:
    """Cut shard sizes so that they sum to at most `max_samples`; shards that are left out have size 0."""
    if max_samples is None:
        return list(sizes)
    limited: list[int] = []
    left = max_samples
    for size in sizes:
        limited.append(min(size, left))
        left -= limited[-1]
    return limited
