"""Exact token counts on disk: one small file per shard and set-up, and the costs made of them.

`<index_dir>/tokens/<fingerprint>/<shard digest>.arrow` has a row per sample of the shard: `tokens` and `patches`, and
what became of the sample (`Outcome`). A shard's counts stay good when other shards come or go.
"""

from __future__ import annotations

import enum
import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlm_dist.data.index.shard_index import replacing
from vlm_dist.data.lengths.costs import Costs
from vlm_dist.data.lengths.estimate import BatchKeys
from vlm_dist.data.types import Source
from vlm_dist.errors import DataError

log = logging.getLogger(__name__)

_FORMAT_VERSION = "1"
_MAX_SHARDS = 4096  # whose counts are kept in memory: 12 bytes per sample

NOT_COUNTED = -2  # of a row that no run has asked for yet
NO_COUNT = -1  # of a sample that becomes an empty slot


class Outcome(enum.IntEnum):
    """What becomes of a sample."""

    FITS = 0
    REDUCED = 1  # its media are made smaller
    CUT = 2  # its text is cut
    TOO_LONG = 3  # an empty slot: it does not fit in its smallest form
    UNUSABLE = 4  # an empty slot for any other reason


@dataclass(frozen=True)
class ShardCounts:
    """The counts of one shard's samples.

    Attributes:
        tokens: int32 [N]; NO_COUNT for empty slots, NOT_COUNTED for rows that nobody has asked for.
        patches: int32 [N], the same.
        outcomes: int8 [N] of `Outcome`.
    """

    tokens: NDArray[np.int32]
    patches: NDArray[np.int32]
    outcomes: NDArray[np.int8]

    @classmethod
    def empty(cls, num_rows: int) -> ShardCounts:
        """Counts of nothing yet."""
        unknown = np.full(num_rows, NOT_COUNTED, dtype=np.int32)
        return cls(unknown, unknown.copy(), np.zeros(num_rows, dtype=np.int8))

    def __len__(self) -> int:
        return len(self.tokens)

    def resized(self, num_rows: int) -> ShardCounts:
        """The same with room for more rows."""
        if num_rows <= len(self):
            return self
        larger = ShardCounts.empty(num_rows)
        for name in ("tokens", "patches", "outcomes"):
            getattr(larger, name)[: len(self)] = getattr(self, name)
        return larger


@dataclass(frozen=True)
class ShardState:
    """How far the counting of one shard of a source is. N samples of the source are in it.

    Attributes:
        shard: number in the source.
        digest: of the shard.
        first_row: of the source.
        within: int64 [N], the samples' rows in the whole shard.
        counted: bool [N].
    """

    shard: int
    digest: str
    first_row: int
    within: NDArray[np.int64]
    counted: NDArray[np.bool_]


class TokenStore:
    """The counts of one set-up.

    Args:
        index_dir: of the run.
        fingerprint: of the set-up.
    """

    def __init__(self, index_dir: Path, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.directory = index_dir / "tokens" / fingerprint

    def path(self, shard_digest: str) -> Path:
        """Where the counts of a shard lie."""
        return self.directory / f"{shard_digest.replace('/', '_')}.arrow"

    def read(self, shard_digest: str) -> ShardCounts | None:
        """Read a shard's counts; None where there are none, or none that can be read."""
        path = self.path(shard_digest)
        try:
            with pa.memory_map(str(path)) as stream, pa.ipc.open_file(stream) as reader:
                table = reader.read_all()
                if (table.schema.metadata or {}).get(b"format") != _FORMAT_VERSION.encode():
                    return None
                return ShardCounts(*(table.column(name).to_numpy().copy() for name in ("tokens", "patches", "outcome")))
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            log.warning("ignoring the damaged token counts %s: %s", path, error)
            return None

    def write(self, shard_digest: str, counts: ShardCounts) -> None:
        """Write a shard's counts atomically.

        Raises:
            DataError: it cannot be written.
        """
        table = pa.table({"tokens": counts.tokens, "patches": counts.patches, "outcome": counts.outcomes})
        table = table.replace_schema_metadata({"format": _FORMAT_VERSION})
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with replacing(self.path(shard_digest)) as stream, pa.ipc.new_file(stream, table.schema) as writer:
                writer.write_table(table)
        except OSError as error:
            raise DataError(
                f"token counts cannot be kept in {self.directory}: {error.strerror}; "
                "set data.index_dir to a directory that can be written"
            ) from error

    def has_files(self, source: Source) -> bool:
        """Whether there are counts of some kind of every shard of a source."""
        try:
            names = {path.name for path in self.directory.iterdir()}
        except OSError:
            return False
        digests = (digest for digest, size in zip(source.shard_digests, source.shard_sizes, strict=True) if size)
        return all(self.path(digest).name in names for digest in digests)

    def covers(self, source: Source) -> bool:
        """Whether every sample of a source has been counted."""
        if not self.has_files(source):
            return False
        return self._mark(source).is_file() or all(state.counted.all() for state in self.scan(source))

    def mark_covered(self, source: Source) -> None:
        """Remember that every sample of a source has been counted: a run with many shards need not look into each."""
        try:
            self._mark(source).write_text(f"{source.name}: {len(source)} samples\n", encoding="utf-8")
        except OSError as error:
            log.debug("cannot write %s: %s", self._mark(source), error)

    def num_uncounted(self, source: Source) -> int:
        """How many samples of a source have no counts yet."""
        return sum(int((~state.counted).sum()) for state in self.scan(source))

    def scan(self, source: Source) -> Iterator[ShardState]:
        """Look what there is, shard by shard; shards without samples are left out."""
        first_row = 0
        for shard, (size, digest) in enumerate(zip(source.shard_sizes, source.shard_digests, strict=True)):
            if size:
                within = source.locate(np.arange(first_row, first_row + size))[1]
                counts = self.read(digest)
                counted = np.zeros(size, dtype=bool)
                if counts is not None:
                    there = within < len(counts)
                    counted[there] = counts.tokens[within[there]] != NOT_COUNTED
                yield ShardState(shard, digest, first_row, within, counted)
            first_row += size

    def _mark(self, source: Source) -> Path:
        name = hashlib.sha256(source.manifest_hash.encode()).hexdigest()[:32]
        return self.directory / f"{name}.covered"


class ExactLengths:
    """Costs as they were counted.

    Args:
        sources: of the run, in order.
        stores: of each source.
        batch_keys: says which samples may share a micro-batch.
    """

    def __init__(self, sources: Sequence[Source], stores: Sequence[TokenStore], batch_keys: BatchKeys) -> None:
        self._sources = list(sources)
        self._stores = list(stores)
        self._batch_keys = batch_keys
        self._digests = [list(source.shard_digests) for source in sources]
        self._counts: OrderedDict[tuple[int, int], ShardCounts] = OrderedDict()

    @property
    def digest(self) -> str:
        """`exact:` and a hex digest; what is counted follows from it and from the sources."""
        facts = [_FORMAT_VERSION, [store.fingerprint for store in self._stores]]
        return "exact:" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]

    @property
    def mixes_all(self) -> bool:
        """Whether any samples may share a micro-batch: all batch keys are 0."""
        return self._batch_keys.mixes_all

    def costs(self, source: int, rows: NDArray[np.int64]) -> Costs:
        """Look the costs of some rows up; a sample that becomes an empty slot costs next to nothing.

        Raises:
            DataError: the counts are gone.
        """
        shards, within = self._sources[source].locate(rows)
        tokens, patches = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
        order = np.argsort(shards, kind="stable")
        borders = np.flatnonzero(np.diff(shards[order], prepend=-1))
        for chosen in np.split(order, borders[1:]) if len(order) else ():
            counts = self._shard(source, int(shards[chosen[0]]), int(within[chosen].max()))
            tokens[chosen] = counts.tokens[within[chosen]]
            patches[chosen] = counts.patches[within[chosen]]
        if (tokens == NOT_COUNTED).any():
            raise _counts_gone(self._sources[source])
        keys = np.zeros_like(tokens)
        if not self._batch_keys.mixes_all:
            keys = self._batch_keys(self._sources[source].facts(rows))
        return Costs(np.maximum(tokens, 1), np.maximum(patches, 0), keys)

    def _shard(self, source: int, shard: int, last_row: int) -> ShardCounts:
        counts = self._counts.get((source, shard))
        if counts is None:
            counts = self._stores[source].read(self._digests[source][shard])
            if counts is None or len(counts) <= last_row:
                raise _counts_gone(self._sources[source])
            self._counts[source, shard] = counts
            while len(self._counts) > _MAX_SHARDS:
                self._counts.popitem(last=False)
        elif len(counts) <= last_row:
            raise _counts_gone(self._sources[source])
        return counts


def _counts_gone(source: Source) -> DataError:
    return DataError(
        f"{source.name}: token counts that were there at the start are gone; count again with "
        "vlm-dist shards tokens RUN.yaml"
    )
