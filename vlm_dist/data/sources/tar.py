"""Tar shards, read by offset: one positioned read per sample, no state."""

from __future__ import annotations

import json
import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.index.facts import FACTS_DTYPE
from vlm_dist.data.index.manifest import Manifest
from vlm_dist.data.index.members import media_columns
from vlm_dist.data.index.shard_index import TAR_BLOCK_BYTES, ShardIndex
from vlm_dist.data.sources.columns import ColumnNames, SourceSettings, setting, source_name
from vlm_dist.data.sources.rows import Rows, limited_sizes
from vlm_dist.data.sources.tar_layout import FIRST_PLACE, TarLayout, is_header_of
from vlm_dist.data.storage.recent import Recent
from vlm_dist.data.storage.shard_storage import CacheSettings, ShardStorage, open_storage
from vlm_dist.data.types import RawSample, SampleOrigin
from vlm_dist.errors import DataError, SkipSample

if TYPE_CHECKING:
    from collections.abc import Collection

_MAX_INDEXES = 256

log = logging.getLogger(__name__)


class TarSource(Rows):
    """Tar shards in webdataset's convention.

    A member's extension is its column; the keys of a `json` member are columns of their own, and so are `image` and
    `video` where every sample has at most one of them. Images, videos and other binary members are bytes, text members
    are str.

    Args:
        name: of the source, for people.
        storage: where the shards and their indexes are.
        manifest: one entry per shard, in the order of `storage`.
        renames: new column -> own column.
        max_samples: use only the first so many.
    """

    def __init__(
        self,
        name: str,
        storage: ShardStorage,
        manifest: Manifest,
        renames: Mapping[str, str] | None = None,
        max_samples: int | None = None,
    ) -> None:
        self._storage = storage
        members = sorted({member for shard in manifest.shards for member in shard.members})
        fields = sorted({field for shard in manifest.shards for field in shard.json_fields})
        hidden = sorted(set(fields) & set(members))
        if hidden:
            log.warning("%s: the JSON fields %s are hidden by members of the same name", name, ", ".join(hidden))
        whole = [member for member in members if member != "json" or not fields]  # an object's fields stand for it
        either = media_columns([(shard.members, shard.single_media) for shard in manifest.shards], [*members, *fields])
        columns = ColumnNames(name, list(dict.fromkeys([*whole, *fields])), renames, either)
        self._sizes = limited_sizes([shard.num_samples for shard in manifest.shards], max_samples)
        self._starts = [0, *accumulate(self._sizes)]
        self._digests = [shard.index_digest for shard in manifest.shards]
        self._members = frozenset(members)
        num_rows = self._starts.pop()
        digest = manifest.hash if max_samples is None else f"{manifest.hash}:{max_samples}"
        super().__init__(name, columns, num_rows, digest)
        self._start()

    @classmethod
    def open(cls, settings: SourceSettings, index_dir: Path | None = None, cache: CacheSettings | None = None) -> Self:
        """Open the shards that `path` means."""
        patterns = setting(settings, "path", [])
        patterns = [str(patterns)] if isinstance(patterns, str | Path) else [str(pattern) for pattern in patterns]
        name = source_name(settings, patterns[0] if patterns else "")
        if not patterns:
            raise DataError(f"{name}: a tar source needs path (a directory, a glob or a brace pattern of shards)")
        storage, manifest = open_storage(name, patterns, index_dir, cache or CacheSettings())
        return cls(name, storage, manifest, setting(settings, "columns"), setting(settings, "max_samples"))

    def keep_columns(self, used: Collection[str]) -> None:
        """Read no member but those of these columns; JSON is read as a whole."""
        super().keep_columns(used)
        self._start()

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Number of samples per shard."""
        return self._sizes

    @property
    def shard_digests(self) -> Sequence[str]:
        """Digest of every shard's index."""
        return self._digests

    @property
    def files(self) -> Sequence[tuple[str, str]]:
        """Name and digest of every shard."""
        return [(self._storage.name(shard), digest) for shard, digest in enumerate(self._digests)]

    def facts(self, rows: NDArray[np.int64]) -> NDArray[np.void]:
        """Length facts per row, from the indexes."""
        shards, within = self.locate(rows)
        facts = np.zeros(len(shards), dtype=FACTS_DTYPE)
        for shard in np.unique(shards):
            chosen = shards == shard
            facts[chosen] = self._index(int(shard)).facts[within[chosen]]
        return facts

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find the shard of each row, and its row within the shard."""
        rows = np.asarray(rows, dtype=np.int64)
        shards = np.searchsorted(self._start_array, rows, side="right") - 1
        return shards, rows - self._start_array[shards]

    def will_read(self, rows: NDArray[np.int64]) -> None:
        """Have the storage read ahead, or fetch what is not on this machine."""
        try:
            shards, within = self.locate(rows)
            firsts = np.unique(shards, return_index=True)[1]
            wanted = {
                int(shard): self._layouts.get(int(shard), self._make_layout).spans(within[shards == shard])
                for shard in shards[np.sort(firsts)]
            }
            self._storage.will_read(wanted)
        except (DataError, OSError) as error:  # who reads these rows meets it again, and tells
            log.debug("%s: cannot read ahead: %s", self.name, error)

    def origin(self, index: int) -> SampleOrigin:
        """Say where a sample lies."""
        shard, row = self._find(index)
        shard_index = self._index(shard)
        first = min((offset for offset, _ in shard_index.members_of(row).values()), default=TAR_BLOCK_BYTES)
        return SampleOrigin(self.name, self._storage.name(shard), shard_index.key(row), first - TAR_BLOCK_BYTES)

    def read(self, index: int) -> RawSample:
        """Read one sample's members.

        Raises:
            SkipSample: if its JSON or text is damaged.
            DataError: if the shard is missing, cut, or not the one that was indexed.
        """
        shard, layout, key, places = self._place(index)
        origin = SampleOrigin(self.name, self._storage.name(shard), key.decode())
        fields: dict[str, Any] = self._read_members(shard, layout, key, places)
        document: dict[str, Any] | None = None
        for member, kind in layout.parsed:
            if member in fields:
                value = _decode(origin, member, kind, fields[member])
                if member == "json" and type(value) is dict:
                    document = value
                    del fields[member]
                else:
                    fields[member] = value
        if document is not None:
            fields = {**document, **fields}
        return RawSample(self._columns.apply(fields), origin)

    def read_members(self, index: int) -> dict[str, bytes]:
        """Read one sample's members as they are stored: own extension -> bytes; none is parsed or renamed.

        Raises:
            DataError: if the shard is missing, cut, or not the one that was indexed.
        """
        return self._read_members(*self._place(index))

    def _read_members(self, shard: int, layout: TarLayout, key: bytes, places: list[int]) -> dict[str, bytes]:
        start, stop, is_one = places[2:5]
        data = self._storage.read(shard, start, stop - start) if is_one and start < stop else b""
        found: dict[str, bytes] = {}
        at = FIRST_PLACE
        for member, ending in layout.members:
            offset, size = places[at], places[at + 1]
            at += 2
            if offset < 0:
                continue
            if is_one:
                place = offset - start
            else:
                place = TAR_BLOCK_BYTES
                data = self._storage.read(shard, offset - place, place + size)
            # with the header before it: a shard that was replaced since it was indexed must not give other data
            if not is_header_of(data, place - TAR_BLOCK_BYTES, key + ending, size):
                raise self._not_there(shard, (key + ending).decode())
            found[member] = data[place : place + size]
        return found

    def _place(self, index: int) -> tuple[int, TarLayout, bytes, list[int]]:
        """Find a sample: its shard, the shard's layout, the sample's key and its row of the layout."""
        shard, row = self._find(index)
        layout = self._layouts.get(shard, self._make_layout)
        places = layout.rows[row].tolist()
        return shard, layout, layout.keys[places[0] : places[1]], places

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self._num_rows:
            self._check(index)
        shard = bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def _index(self, shard: int) -> ShardIndex:
        return self._indexes.get(shard, lambda number: self._storage.index(number, self._digests[number]))

    def _make_layout(self, shard: int) -> TarLayout:
        # a worker needs no facts: it keeps the layout alone
        index = self._indexes.find(shard) or self._storage.index(shard, self._digests[shard])
        return TarLayout(index, self._is_read)

    def _is_read(self, member: str) -> bool:
        if member == "json":
            return self._columns.keeps_any_but(self._members - {"json"})
        return self._columns.is_kept(member)

    def _not_there(self, shard: int, member: str) -> DataError:
        return DataError(
            f"{self._storage.place(shard)}: {member!r} is not at the place that the index says: the shard is not the "
            "one that was indexed; put that back, or start a new run"
        )

    def _start(self) -> None:
        self._indexes: Recent[int, ShardIndex] = Recent(_MAX_INDEXES)
        self._layouts: Recent[int, TarLayout] = Recent(_MAX_INDEXES)
        self._start_array = np.asarray(self._starts, dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        kept = dict(self.__dict__)
        for name in ("_indexes", "_layouts", "_start_array"):
            del kept[name]
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


def _decode(origin: SampleOrigin, member: str, kind: str, data: bytes) -> Any:
    try:
        if kind == "json":
            return _parse_json(data)
        if kind == "text":
            return data.decode("utf-8")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return data
    except ValueError as error:
        raise SkipSample("bad_sample", f"{origin}: member {member!r} is damaged: {error}") from error


_scan_json = json.JSONDecoder().raw_decode


def _parse_json(data: bytes) -> Any:
    """Parse a document; twice as fast as `json.loads` where it is as most writers make it."""
    try:
        text = data.decode("utf-8")
        value, end = _scan_json(text)
    except ValueError:
        return json.loads(data)
    return value if end == len(text) else json.loads(data)
