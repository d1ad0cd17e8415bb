"""Exact token counts on disk: one small file per shard and set-up, and the costs made of them.

`<index_dir>/tokens/<fingerprint>/<shard digest>.arrow` has a row per sample of the shard: `tokens` and `patches`, and
what became of the sample (`Outcome`). A shard's counts stay good when other shards come or go.

`<manifest hash>.covered` beside them says that all samples of a source have counts, and has a check of each shard's: a
run with many shards need not look into each before it starts, yet plans by none but these.
"""

from __future__ import annotations

import enum
import hashlib
import json
import logging
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlm_dist.data.index.shard_index import replacing
from vlm_dist.data.lengths.costs import Costs
from vlm_dist.data.lengths.estimate import BatchKeys, estimate_num_tokens
from vlm_dist.data.types import Source
from vlm_dist.errors import DataError

log = logging.getLogger(__name__)

_FORMAT_VERSION = "2"
_BEFORE_LOST = "1"  # when samples that timed out or crashed were written down as unusable
_MARK_SUFFIX = ".covered"
_COLUMNS = {"tokens": np.int32, "patches": np.int32, "outcome": np.int8}
_MAX_SHARDS = 4096  # whose counts are kept in memory: 12 bytes per sample

NOT_COUNTED = -2  # of a row that no run has asked for yet
NO_COUNT = -1  # of a sample that becomes an empty slot
LOST = -3  # of a sample that timed out or ended its worker: that may be the machine's fault, so it is tried again


class Outcome(enum.IntEnum):
    """What becomes of a sample."""

    FITS = 0
    REDUCED = 1  # its media are made smaller
    CUT = 2  # its text is cut
    TOO_LONG = 3  # an empty slot: it does not fit in its smallest form
    UNUSABLE = 4  # an empty slot for any other reason
    LOST = 5  # perhaps an empty slot: it timed out or ended its worker


@dataclass(frozen=True)
class ShardCounts:
    """The counts of one shard's samples.

    Attributes:
        tokens: int32 [N]; NO_COUNT for empty slots, LOST for those that may be, NOT_COUNTED for rows that nobody has
            asked for.
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

    def of_rows(self, rows: NDArray[np.int64]) -> ShardCounts:
        """The counts of some rows; NOT_COUNTED beyond the end."""
        whole = self.resized(int(rows.max(initial=-1)) + 1)
        return ShardCounts(whole.tokens[rows], whole.patches[rows], whole.outcomes[rows])

    @property
    def check(self) -> int:
        """CRC-32 of all that plans depend on."""
        return zlib.crc32(self.patches.astype("<i4").tobytes(), zlib.crc32(self.tokens.astype("<i4").tobytes()))

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
        counts: of the N samples.
    """

    shard: int
    digest: str
    first_row: int
    within: NDArray[np.int64]
    counts: ShardCounts

    @property
    def counted(self) -> NDArray[np.bool_]:
        """Of which samples a count has been tried, bool [N]."""
        counted: NDArray[np.bool_] = self.counts.tokens != NOT_COUNTED
        return counted

    @property
    def is_due(self) -> NDArray[np.bool_]:
        """Which samples a count has to look at, bool [N]: also those that were lost before."""
        is_due: NDArray[np.bool_] = (self.counts.tokens == NOT_COUNTED) | (self.counts.tokens == LOST)
        return is_due


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
            with pa.OSFile(str(path)) as stream, pa.ipc.open_file(stream) as reader:
                metadata = reader.schema.metadata or {}
                form = metadata.get(b"format", b"").decode()
                if form not in (_FORMAT_VERSION, _BEFORE_LOST):
                    return None
                table = reader.read_all()
            table.validate(full=True)
            counts = ShardCounts(*(_column(table, name) for name in _COLUMNS))
            if form == _BEFORE_LOST:
                for numbers in (counts.tokens, counts.patches):
                    numbers[counts.outcomes == Outcome.UNUSABLE] = LOST
            elif metadata[b"check"] != str(counts.check).encode():
                raise ValueError("its content is not what was written")
            return counts
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001 - a damaged file fails in any place, with errors of all kinds
            log.warning("ignoring the damaged token counts %s: %s: %s", path, type(error).__name__, error)
            return None

    def write(self, shard_digest: str, counts: ShardCounts) -> None:
        """Write a shard's counts atomically; what was said of the sources that they may be part of is taken back.

        Raises:
            DataError: it cannot be written.
        """
        table = pa.table({"tokens": counts.tokens, "patches": counts.patches, "outcome": counts.outcomes})
        table = table.replace_schema_metadata({"format": _FORMAT_VERSION, "check": str(counts.check)})
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for mark in self.directory.glob(f"*{_MARK_SUFFIX}"):
                mark.unlink(missing_ok=True)
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
        return self.checks(source) is not None

    def checks(self, source: Source) -> tuple[int, ...] | None:
        """The check of each shard's counts, 0 for shards without samples; None unless every sample has been counted."""
        if not self.has_files(source):
            return None
        try:
            said = json.loads(self._mark(source).read_bytes())["checks"]
            if len(said) == len(source.shard_sizes) and all(isinstance(check, int) for check in said):
                return tuple(said)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.debug("%s does not help: %r", self._mark(source), error)
        return self.mark_covered(source)

    def mark_covered(self, source: Source) -> tuple[int, ...] | None:
        """Look whether every sample of a source has been counted, and remember the checks of what is there."""
        checks = [0] * len(source.shard_sizes)
        for state in self.scan(source):
            if not state.counted.all():
                return None
            checks[state.shard] = state.counts.check
        try:
            with replacing(self._mark(source)) as stream:
                stream.write(json.dumps({"source": source.name, "samples": len(source), "checks": checks}).encode())
        except OSError as error:
            log.debug("cannot write %s: %s", self._mark(source), error)
        return tuple(checks)

    def num_uncounted(self, source: Source) -> int:
        """How many samples of a source have no counts yet."""
        return sum(int((~state.counted).sum()) for state in self.scan(source))

    def scan(self, source: Source) -> Iterator[ShardState]:
        """Look what there is, shard by shard; shards without samples are left out."""
        first_row = 0
        for shard, (size, digest) in enumerate(zip(source.shard_sizes, source.shard_digests, strict=True)):
            if size:
                within = source.locate(np.arange(first_row, first_row + size))[1]
                counts = (self.read(digest) or ShardCounts.empty(0)).of_rows(within)
                yield ShardState(shard, digest, first_row, within, counts)
            first_row += size

    def _mark(self, source: Source) -> Path:
        name = hashlib.sha256(source.manifest_hash.encode()).hexdigest()[:32]
        return self.directory / (name + _MARK_SUFFIX)


def _column(table: pa.Table, name: str) -> NDArray[Any]:
    column = table.column(name)
    if column.type != pa.from_numpy_dtype(_COLUMNS[name]) or column.null_count:
        raise ValueError(f"its column {name} is of another type ({column.type})")
    numbers: NDArray[Any] = column.to_numpy().copy()
    return numbers


class ExactLengths:
    """Costs as they were counted; those of samples that were lost over the counting are estimated.

    Args:
        sources: of the run, in order.
        stores: of each source.
        batch_keys: says which samples may share a micro-batch.
        checks: of each source's counts, as `TokenStore.checks` gives them; None: looked up.
        max_length: that no sample is longer than, in tokens.
        patches_per_token: of the family.

    Raises:
        DataError: not all samples have been counted.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        stores: Sequence[TokenStore],
        batch_keys: BatchKeys,
        checks: Sequence[Sequence[int]] | None = None,
        max_length: int | None = None,
        patches_per_token: int = 1,
    ) -> None:
        self._sources = list(sources)
        self._stores = list(stores)
        self._batch_keys = batch_keys
        self._max_length = max_length
        self._patches_per_token = patches_per_token
        self._digests = [list(source.shard_digests) for source in sources]
        self._starts = [np.cumsum([0, *source.shard_sizes]) for source in sources]
        self._counts: OrderedDict[tuple[int, int], ShardCounts] = OrderedDict()
        if checks is None:
            found = [store.checks(source) for source, store in zip(sources, stores, strict=True)]
            missing = next((source for source, one in zip(sources, found, strict=True) if one is None), None)
            if missing is not None:
                raise _counts_gone(missing)
            checks = [one for one in found if one is not None]
        self._checks = [list(one) for one in checks]

    @property
    def digest(self) -> str:
        """`exact:` and a hex digest of set-up and counts."""
        facts = [_FORMAT_VERSION, [store.fingerprint for store in self._stores], self._checks]
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
        lost = np.flatnonzero(tokens == LOST)
        if len(lost):
            tokens[lost], patches[lost] = self._estimate(self._sources[source].facts(rows[lost]))
        keys = np.zeros_like(tokens)
        if not self._batch_keys.mixes_all:
            keys = self._batch_keys(self._sources[source].facts(rows))
        return Costs(np.maximum(tokens, 1), np.maximum(patches, 0), keys)

    def _estimate(self, facts: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and patches of samples that nobody could count: two int64 [N]."""
        media = facts.copy()
        media["text_bytes"] = 0
        has_media = (facts["num_images"] > 0) | (facts["num_videos"] > 0)
        limit = np.iinfo(np.int32).max if self._max_length is None else self._max_length
        tokens = np.minimum(estimate_num_tokens(facts), limit)
        return tokens, np.minimum(estimate_num_tokens(media), tokens) * has_media * self._patches_per_token

    def _shard(self, source: int, shard: int, last_row: int) -> ShardCounts:
        counts = self._counts.get((source, shard))
        if counts is None:
            counts = self._stores[source].read(self._digests[source][shard])
            if counts is None:
                raise _counts_gone(self._sources[source])
            first, stop = self._starts[source][shard : shard + 2].tolist()
            within = self._sources[source].locate(np.arange(first, stop))[1]
            if counts.of_rows(within).check != self._checks[source][shard]:
                raise _counts_gone(self._sources[source])
            self._counts[source, shard] = counts
            while len(self._counts) > _MAX_SHARDS:
                self._counts.popitem(last=False)
        if len(counts) <= last_row:
            raise _counts_gone(self._sources[source])
        return counts


def _counts_gone(source: Source) -> DataError:
    return DataError(
        f"{source.name}: token counts that were there at the start are gone or others; count again with "
        "vlm-dist shards tokens RUN.yaml"
    )
