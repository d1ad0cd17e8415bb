"""Part of a source: the samples that meet conditions, or a random share of them."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlm_dist.config.conditions import Condition
from vlm_dist.data.index.facts import FACTS_DTYPE
from vlm_dist.data.index.shard_index import replacing
from vlm_dist.data.plan.hashing import hash_rows, hash_words
from vlm_dist.data.storage.recent import Recent
from vlm_dist.data.types import RawSample, SampleOrigin, Source
from vlm_dist.errors import DataError, SkipSample

#: Changes whenever the same settings would keep other samples.
_VERSION = 1
_MAX_DENOMINATOR = 10**6
_MAX_SHARDS = 256  # whose kept rows are remembered
_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.int64)

log = logging.getLogger(__name__)


class KeepsColumns(Source, Protocol):
    """A source that can be told to read few columns."""

    def keep_columns(self, used: Collection[str]) -> None:
        """Read no column but these."""


class FilteredSource:
    """A source with fewer samples, in the same order and the same shards.

    Conditions are evaluated once, shard by shard; what they keep is a bit per sample, in a file under `index_dir`. The
    random share takes its part of every shard, so that nothing has to be evaluated for it.

    Args:
        source: the whole.
        conditions: that a sample must meet, all of them.
        share: of those, so much, chosen by a hash of shard and row.
        seed: another one chooses others.
        index_dir: where the bits are kept; None: nowhere.

    Raises:
        DataError: a condition names no fact and no column, or nothing is left.
    """

    def __init__(
        self,
        source: KeepsColumns,
        conditions: Sequence[Condition] = (),
        share: float = 1.0,
        seed: int = 0,
        index_dir: Path | None = None,
    ) -> None:
        self.name = source.name
        self._source = source
        self._share = share
        self._seed = seed
        said = [_VERSION, sorted(map(str, conditions)), share, seed]
        self._hash = _digest([source.manifest_hash, said])
        self._whole = np.asarray(source.shard_sizes, dtype=np.int64)
        self._bits: NDArray[np.uint8] | None = None
        self._bits_path: Path | None = None
        met = self._whole
        if conditions:
            met = self._evaluate(conditions, index_dir, _digest([source.manifest_hash, said[:2]]))
        # in whole numbers: every shard gives its share to within one, and all together exactly theirs
        part = Fraction(str(share)).limit_denominator(_MAX_DENOMINATOR)
        ends = np.cumsum(met) * part.numerator // part.denominator
        self._sizes = np.diff(ends, prepend=0)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._kept: Recent[int, NDArray[np.int64]] = Recent(_MAX_SHARDS)
        if not self._sizes.sum():
            words = " and ".join(map(str, conditions)) or f"a share of {share:g}"
            raise DataError(f"{self.name}: of its {len(source)} samples, none is left by {words}")
        log.info("%s: %d of %d samples", self.name, len(self), len(source))

    def keep_columns(self, used: Collection[str]) -> None:
        """Read no column but these."""
        self._source.keep_columns(used)

    def __len__(self) -> int:
        return int(self._sizes.sum())

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of the whole."""
        return self._source.columns

    @property
    def manifest_hash(self) -> str:
        """Hex digest over the whole and what is kept of it."""
        return self._hash

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Number of samples that are left in each shard."""
        sizes: list[int] = self._sizes.tolist()
        return sizes

    @property
    def shard_digests(self) -> Sequence[str]:
        """Those of the whole: counts of tokens belong to whole shards."""
        return self._source.shard_digests

    @property
    def files(self) -> Sequence[tuple[str, str]]:
        """Those of the whole."""
        return self._source.files

    def facts(self, rows: NDArray[np.int64]) -> NDArray[np.void]:
        """Length facts per row."""
        return self._source.facts(self._own(rows))

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find the shard of each row, and its row within the whole shard."""
        return self._source.locate(self._own(rows))

    def will_read(self, rows: NDArray[np.int64]) -> None:
        """Pass the hint on."""
        self._source.will_read(self._own(rows))

    def origin(self, index: int) -> SampleOrigin:
        """Say where a sample lies."""
        return self._source.origin(self._own_one(index))

    def read(self, index: int) -> RawSample:
        """Read one sample."""
        return self._source.read(self._own_one(index))

    def _own_one(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: row {index} of {len(self)}")
        return int(self._own(np.asarray([index]))[0])

    def _own(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same samples as rows of the whole."""
        rows = np.asarray(rows, dtype=np.int64)
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        own = np.empty(len(rows), dtype=np.int64)
        order = np.argsort(shards, kind="stable")
        borders = np.flatnonzero(np.diff(shards[order], prepend=-1))
        for chosen in np.split(order, borders[1:]) if len(order) else ():
            shard = int(shards[chosen[0]])
            own[chosen] = self._kept.get(shard, self._rows_of)[rows[chosen] - self._starts[shard]]
        return own

    def _rows_of(self, shard: int) -> NDArray[np.int64]:
        """Rows of the whole that are left in a shard, ascending."""
        size = int(self._whole[shard])
        within = np.arange(size, dtype=np.int64)
        if self._bits is not None or self._bits_path is not None:
            bits = self._load_bits()
            first = int((-(-self._whole[:shard] // 8)).sum())
            within = np.flatnonzero(np.unpackbits(bits[first : first - (-size // 8)], count=size))
        if self._share < 1:
            order = np.argsort(hash_rows(hash_words(self._seed, shard), within), kind="stable")
            within = np.sort(within[order[: self._sizes[shard]]])
        return within + int(self._whole[:shard].sum())

    def _evaluate(self, conditions: Sequence[Condition], index_dir: Path | None, name: str) -> NDArray[np.int64]:
        """Find which samples meet the conditions; returns how many in each shard."""
        path = None if index_dir is None else index_dir / "where" / f"{name}.bits"
        num_bytes = -(-self._whole // 8)
        if path is not None and path.is_file() and path.stat().st_size == num_bytes.sum():
            self._bits_path = path
        else:
            meets = _column_test(self._source, conditions)
            first, parts = 0, []
            for size in self._whole.tolist():
                parts.append(np.packbits(meets(np.arange(first, first + size))))
                first += size
            self._bits = np.concatenate(parts)
            if path is not None:
                self._keep_bits(path)
        ones = np.concatenate([[0], np.cumsum(_ONES[self._load_bits()])])
        ends = np.cumsum(num_bytes)
        counts: NDArray[np.int64] = ones[ends] - ones[ends - num_bytes]
        return counts

    def _keep_bits(self, path: Path) -> None:
        assert self._bits is not None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as stream:
                stream.write(self._bits.tobytes())
        except OSError as error:
            log.warning(
                "%s: what `where` keeps cannot be written to %s (%s) and is found out again next time; "
                "set data.index_dir to a writable directory",
                self.name,
                path.parent,
                error.strerror,
            )
            return
        self._bits, self._bits_path = None, path

    def _load_bits(self) -> NDArray[np.uint8]:
        if self._bits is None:
            assert self._bits_path is not None
            try:
                self._bits = np.memmap(self._bits_path, dtype=np.uint8, mode="r")
            except OSError as error:
                raise DataError(
                    f"{self.name}: {self._bits_path} cannot be read: {error}; delete it and start again"
                ) from error
        return self._bits

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_kept": None}
        if self._bits_path is not None:  # each process maps the file
            state["_bits"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._kept = Recent(_MAX_SHARDS)


def _column_test(
    source: KeepsColumns, conditions: Sequence[Condition]
) -> Callable[[NDArray[np.int64]], NDArray[np.bool_]]:
    """Make the test: rows [N] -> bool [N]. Facts come from the index, other columns have to be read."""
    on_facts = [one for one in conditions if one.column in (FACTS_DTYPE.names or ())]
    on_columns = [one for one in conditions if one.column not in (FACTS_DTYPE.names or ())]
    unknown = sorted({one.column for one in on_columns} - set(source.columns))
    if unknown:
        hint = "; tokens depend on the model: text_bytes comes near" if "tokens" in unknown else ""
        raise DataError(
            f"{source.name}: where names {', '.join(unknown)}, which is no fact and no column{hint}; facts: "
            f"{', '.join(FACTS_DTYPE.names or ())}; columns: {', '.join(source.columns)}"
        )
    texts = [str(one) for one in on_facts if isinstance(one.value, str)]
    if texts:
        raise DataError(f"{source.name}: where: {' and '.join(texts)} compares a number with a text")
    reader = source
    if on_columns:
        reader = copy.deepcopy(source)
        reader.keep_columns({one.column for one in on_columns})  # no pictures
        log.info("%s: reading %d samples for where", source.name, len(source))

    def meets(rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        kept = np.ones(len(rows), dtype=bool)
        if on_facts:
            facts = source.facts(rows)
            for one in on_facts:
                kept &= one.holds(facts[one.column])
        for place in np.flatnonzero(kept) if on_columns else ():
            try:
                fields = reader.read(int(rows[place])).fields
            except (SkipSample, RecursionError):  # it could not be trained on anyway
                kept[place] = False
                continue
            kept[place] = all(one.holds_for(fields.get(one.column)) for one in on_columns)
        return kept

    return meets


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]
