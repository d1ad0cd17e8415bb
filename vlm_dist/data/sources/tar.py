"""Tar shards, read by offset: one positioned read per member, no state."""

from __future__ import annotations

import json
import logging
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.index.facts import FACTS_DTYPE, member_kind
from vlm_dist.data.index.manifest import Manifest, ShardEntry, read_manifest
from vlm_dist.data.index.shard_index import TAR_BLOCK_BYTES, ShardIndex, sidecar_paths
from vlm_dist.data.index.tar_scan import load_or_scan
from vlm_dist.data.sources.columns import ColumnNames, SourceSettings, setting, source_name
from vlm_dist.data.sources.shards import find_files, limited_sizes
from vlm_dist.data.storage.open_files import OpenFiles
from vlm_dist.data.types import RawSample, SampleOrigin
from vlm_dist.errors import DataError, SkipSample

_MAX_INDEXES = 256
_NAME_BYTES = 100
_SIZE_FIELD = slice(124, 136)

log = logging.getLogger(__name__)


class TarSource:
    """Local tar shards in webdataset's convention.

    A member's extension is its column; the keys of a `json` member are columns of their own. Images, videos and other
    binary members are bytes, text members are str.

    Args:
        name: of the source, for people.
        paths: the shards.
        manifest: one entry per shard, in the order of `paths`.
        index_dir: where indexes lie that are not beside their shard.
        renames: new column -> own column.
        max_samples: use only the first so many.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        manifest: Manifest,
        index_dir: Path | None = None,
        renames: Mapping[str, str] | None = None,
        max_samples: int | None = None,
    ) -> None:
        self.name = name
        self._files = OpenFiles(paths)
        self._index_dir = index_dir
        members = sorted({member for shard in manifest.shards for member in shard.members})
        fields = sorted({field for shard in manifest.shards for field in shard.json_fields})
        hidden = sorted(set(fields) & set(members))
        if hidden:
            log.warning("%s: the JSON fields %s are hidden by members of the same name", name, ", ".join(hidden))
        whole = [member for member in members if member != "json" or not fields]  # an object's fields stand for it
        self._columns = ColumnNames(name, list(dict.fromkeys([*whole, *fields])), renames)
        self._sizes = limited_sizes([shard.num_samples for shard in manifest.shards], max_samples)
        self._starts = [0, *accumulate(self._sizes)]
        self._digests = [shard.index_digest for shard in manifest.shards]
        self._hash = manifest.hash if max_samples is None else f"{manifest.hash}:{max_samples}"
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()

    @classmethod
    def open(cls, settings: SourceSettings, index_dir: Path | None = None) -> Self:
        """Open the shards that `path` means (a directory, a glob or a brace pattern)."""
        pattern = str(setting(settings, "path", ""))
        name = source_name(settings, pattern)
        if not pattern:
            raise DataError(f"{name}: a tar source needs path (a directory, a glob or a brace pattern of shards)")
        paths = find_files(name, pattern, (".tar",))
        manifest = describe_shards(paths, index_dir)
        return cls(name, paths, manifest, index_dir, setting(settings, "columns"), setting(settings, "max_samples"))

    def keep_columns(self, used: Collection[str]) -> None:
        """Read no member but those of these columns; JSON is read as a whole."""
        self._columns.keep(used)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def columns(self) -> tuple[str, ...]:
        """Member extensions and fields of the JSON members, renamed."""
        return self._columns.names

    @property
    def manifest_hash(self) -> str:
        """Hex digest over all shards' names, sizes and indexes."""
        return self._hash

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Number of samples per shard."""
        return self._sizes

    @property
    def shard_digests(self) -> Sequence[str]:
        """Digest of every shard's index."""
        return self._digests

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
        starts = np.asarray(self._starts, dtype=np.int64)
        shards = np.searchsorted(starts, rows, side="right") - 1
        return shards, rows - starts[shards]

    def will_read(self, rows: NDArray[np.int64]) -> None:
        """Nothing to do yet for local files."""

    def origin(self, index: int) -> SampleOrigin:
        """Say where a sample lies."""
        shard, row = self._locate(index)
        return SampleOrigin(self.name, self._files.paths[shard].name, self._index(shard).key(row))

    def read(self, index: int) -> RawSample:
        """Read one sample's members.

        Raises:
            SkipSample: if its JSON or text is damaged.
            DataError: if the shard is missing, cut, or not the one that was indexed.
        """
        shard, row = self._locate(index)
        shard_index = self._index(shard)
        key = shard_index.key(row)
        origin = SampleOrigin(self.name, self._files.paths[shard].name, key)
        fields: dict[str, Any] = {}
        members: dict[str, Any] = {}
        for member, (offset, size) in shard_index.members_of(row).items():
            if member != "json" and not self._columns.is_kept(member):
                continue
            value = _decode(origin, member, self._read_member(shard, f"{key}.{member}", offset, size))
            if member == "json" and isinstance(value, dict):
                fields = value
            else:
                members[member] = value
        return RawSample(self._columns.apply({**fields, **members}), origin)

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: row {index} of {len(self)}")
        shard = bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def _index(self, shard: int) -> ShardIndex:
        index = self._indexes.get(shard)
        if index is None:
            index = load_or_scan(self._files.paths[shard], self._index_dir)
            self._indexes[shard] = index
            while len(self._indexes) > _MAX_INDEXES:
                self._indexes.popitem(last=False)
        return index

    def _read_member(self, shard: int, name: str, offset: int, size: int) -> bytes:
        # with the header before it: a shard that was replaced since it was indexed must not give other data
        data = self._files.read(shard, offset - TAR_BLOCK_BYTES, TAR_BLOCK_BYTES + size)
        _check_header(self._files.paths[shard], name, data[:TAR_BLOCK_BYTES], size)
        return data[TAR_BLOCK_BYTES:]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indexes": OrderedDict()}


def describe_shards(paths: Sequence[Path], index_dir: Path | None = None) -> Manifest:
    """Make the manifest of some shards from their directories' manifests and from their indexes.

    Raises:
        DataError: if a shard cannot be indexed.
    """
    root = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    known: dict[Path, dict[str, ShardEntry]] = {}
    entries: list[ShardEntry] = []
    for path in paths:
        folder = path.parent
        if folder not in known:
            manifest = read_manifest(folder)
            known[folder] = {shard.name: shard for shard in manifest.shards} if manifest else {}
        entry = known[folder].get(path.name)
        if entry is None or entry.num_bytes != path.stat().st_size or not sidecar_paths(path, None)[0].exists():
            entry = ShardEntry.of(path.name, load_or_scan(path, index_dir))
        name = str((path.resolve().parent / path.name).relative_to(root))
        entries.append(
            ShardEntry(name, entry.num_samples, entry.num_bytes, entry.index_digest, entry.members, entry.json_fields)
        )
    return Manifest(tuple(entries))


def _check_header(path: Path, name: str, header: bytes, size: int) -> None:
    """Compare the tar header before the data with the index."""
    own_name = header[:_NAME_BYTES].rstrip(b"\0").decode("utf-8", "replace")
    try:
        own_size = int(header[_SIZE_FIELD].rstrip(b"\0 ") or b"0", 8)
    except ValueError:  # sizes above 8 GiB are binary
        own_size = size
    # long names stand in an extra header before this one, and prefixes in another field
    same_name = len(own_name.encode()) >= _NAME_BYTES or name.lower().endswith(own_name.lower()) or not name.isascii()
    if own_size != size or not same_name:
        raise DataError(
            f"{path}: {name!r} is not at the place that the index says; delete the shard's .index.arrow file"
        )


def _decode(origin: SampleOrigin, member: str, data: bytes) -> Any:
    kind = member_kind(member)
    try:
        if kind == "json":
            return json.loads(data)
        if kind == "text":
            return data.decode("utf-8")
        if kind == "unknown":
            try:
                return data.decode("utf-8")
            except UnicodeDecodeError:
                return data
    except ValueError as error:
        raise SkipSample("bad_sample", f"{origin}: member {member!r} is damaged: {error}") from error
    return data
