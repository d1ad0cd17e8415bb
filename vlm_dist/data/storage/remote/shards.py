"""Shards that are not on this machine: copied to it before they are needed, or read where they are."""

from __future__ import annotations

import errno
import logging
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.index.manifest import Manifest
from vlm_dist.data.index.open_index import differing_keys
from vlm_dist.data.index.shard_index import ShardIndex
from vlm_dist.data.storage.open_files import Descriptor, truncated
from vlm_dist.data.storage.recent import Recent
from vlm_dist.data.storage.remote.indexes import MAX_FIRST_USE_BYTES, RemoteIndexes, describe_remote_shards
from vlm_dist.data.storage.remote.listing import list_shards
from vlm_dist.data.storage.remote.prefetch import Prefetcher
from vlm_dist.data.storage.remote.shard_cache import NoRoomError, ShardCache
from vlm_dist.data.storage.remote.store import RangeNotHonouredError, RemoteObject, store_for
from vlm_dist.data.storage.remote.urls import copy_key, file_name, shown
from vlm_dist.data.storage.shard_storage import CacheSettings
from vlm_dist.errors import DataError

_MAX_OPEN_FILES = 128
#: So many samples of a shard are read where they are before it is copied after all: nobody seems to fetch it ahead.
_MAX_RANGES = 4

log = logging.getLogger(__name__)


class Indexes(Protocol):
    """Where the indexes of shards are; picklable."""

    def load(self, url: str, digest: str) -> ShardIndex:
        """Load the index of a shard."""


class Bytes(Protocol):
    """What is needed of a `RemoteStore` when a shard is known."""

    def read(self, url: str, start: int, stop: int, num_bytes: int) -> bytes:
        """Read a range of bytes."""

    def download(self, url: str, expected: RemoteObject, descriptor: int, on_bytes: Callable[[int], None]) -> int:
        """Write an object to the start of an open file."""


class RemoteShards:
    """Reads shards of a server, through copies on this machine.

    Args:
        urls: the shards.
        manifest: what is in them.
        indexes: where their indexes are.
        settings: of the copies.
    """

    def __init__(self, urls: Sequence[str], manifest: Manifest, indexes: Indexes, settings: CacheSettings) -> None:
        self._urls = list(urls)
        self._sizes = [shard.num_bytes for shard in manifest.shards]
        self._digests = [shard.index_digest for shard in manifest.shards]
        self._indexes = indexes
        self._settings = settings
        self._cache: ShardCache | None = None
        self._start()

    def __len__(self) -> int:
        return len(self._urls)

    def name(self, shard: int) -> str:
        """File name, for people."""
        return file_name(self._urls[shard])

    def place(self, shard: int) -> str:
        """URL, for errors."""
        return shown(self._urls[shard])

    def index(self, shard: int, digest: str) -> ShardIndex:
        """Load an index, from where it is kept or from the server."""
        return self._indexes.load(self._urls[shard], digest)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Read exactly `size` bytes, from the copy or from the server.

        Raises:
            DataError: the shard is gone or has changed, or the server or the disk fails.
        """
        descriptor = self._open.find(shard)
        if descriptor is None:
            data = self._read_in_place(shard, offset, size)
            if data is not None:
                return data
            try:
                descriptor = self._open.get(shard, self._open_copy)
            except NoRoomError as error:
                return self._read_without_room(shard, offset, size, error)
        try:
            data = descriptor.read(offset, size)
        except OSError as error:
            raise DataError(f"{self.place(shard)}: the copy in the cache cannot be read: {error}") from error
        if len(data) < size:
            raise truncated(self.place(shard), offset, size, len(data))
        return data

    def will_read(self, spans: Mapping[int, NDArray[np.int64]]) -> None:
        """Fetch the shards in the background, those of earlier calls first; keep what is here already."""
        if self._settings.mode == "range":
            return
        self._announced.append(tuple(spans))
        needed = list(dict.fromkeys(shard for step in self._announced for shard in step))
        cache = self._get_cache()
        cache.touch(self._key(shard) for shard in reversed(needed))  # the nearest is kept longest
        self._prefetcher.want([shard for shard in needed if not cache.has(self._key(shard))])

    def fetch(self, shard: int) -> Descriptor:
        """Open the copy of a shard; what is not here is fetched now."""
        return self._fetch(shard, keep=None)

    def _fetch_ahead(self, shard: int) -> bool:
        needed = {other for step in list(self._announced) for other in step}
        try:
            self._fetch(shard, keep={self._key(other) for other in needed}, check_open=self._prefetcher.check_open)
        except NoRoomError:
            return False  # later, when something is not needed any more
        return True

    def _fetch(self, shard: int, keep: set[str] | None, check_open: Callable[[], None] = lambda: None) -> Descriptor:
        url, num_bytes = self._urls[shard], self._sizes[shard]
        expected = RemoteObject(num_bytes, "")  # the content is compared, which tells more than a version

        def download(descriptor: int, on_bytes: Callable[[int], None]) -> int:
            def report(num_written: int) -> None:
                check_open()
                on_bytes(num_written)

            return self._store(url).download(url, expected, descriptor, report)

        def check(copy: Path) -> None:
            index = self.index(shard, self._digests[shard])
            odd = differing_keys(copy, index) if index.checks is not None else []
            if odd:
                raise DataError(
                    f"{shown(url)}: the shard has changed since it was indexed ({len(odd)} of {len(index)} samples "
                    f"differ, first {odd[0]!r}); put the old one back, or index it again (vlm-dist shards index) and "
                    "start a new run"
                )

        return self._get_cache().fetch(self._key(shard), num_bytes, download, keep=keep, check=check)

    def _read_in_place(self, shard: int, offset: int, size: int) -> bytes | None:
        """Read from the server, where that is asked for or saves waiting for the copy; None: not this time."""
        if self._settings.mode == "whole" or self._host(shard) in self._hosts_without_ranges:
            return None
        if self._settings.mode == "auto" and shard not in self._without_room:
            cache, key = self._get_cache(), self._key(shard)
            if cache.has(key):
                return None
            self._num_ranges[shard] += 1
            if self._num_ranges[shard] > _MAX_RANGES and not cache.is_being_fetched(key):
                return None
        return self._read_range(shard, offset, size)

    def _read_range(self, shard: int, offset: int, size: int) -> bytes | None:
        """Read from the server; None where that gives whole shards only."""
        url = self._urls[shard]
        try:
            return self._store(url).read(url, offset, offset + size, self._sizes[shard])
        except RangeNotHonouredError:
            self._hosts_without_ranges.add(self._host(shard))
            if self._settings.mode == "range":
                raise DataError(
                    f"{shown(url)}: the server does not honour ranges; set data.cache.mode to auto or whole"
                ) from None
            return None

    def _read_without_room(self, shard: int, offset: int, size: int, reason: NoRoomError) -> bytes:
        """Read from the server, because no copy can be made."""
        data = None
        if self._settings.mode == "auto" and self._host(shard) not in self._hosts_without_ranges:
            data = self._read_range(shard, offset, size)
        if data is None:
            raise DataError(f"{self.place(shard)}: {reason}") from reason
        if not self._without_room:
            log.warning("%s; samples are read from the server, one request each", reason)
        self._without_room.add(shard)
        return data

    def _open_copy(self, shard: int) -> Descriptor:
        """Open the copy of a shard. Copies that others have removed are closed now: their space is free only then."""
        self._open.drop_where(Descriptor.is_deleted)
        try:
            copy = self.fetch(shard)
        except OSError as error:
            hint = "; raise the limit of open files (ulimit -n)" if error.errno == errno.EMFILE else ""
            raise DataError(f"{self.place(shard)}: the copy in the cache cannot be read: {error}{hint}") from error
        self._open.drop_where(Descriptor.is_deleted)
        self._get_cache().touch([self._key(shard)])
        return copy

    def _store(self, url: str) -> Bytes:
        return store_for(url)

    def _host(self, shard: int) -> str:
        return self._urls[shard].split("/", 3)[2]

    def _key(self, shard: int) -> str:
        return copy_key(self._urls[shard], self._digests[shard])

    def _get_cache(self) -> ShardCache:
        if self._cache is None:
            self._cache = ShardCache(self._settings.dir, self._settings.max_bytes)
        return self._cache

    def _start(self) -> None:
        # a few more than are announced ahead: those that workers are at
        self._announced: deque[Sequence[int]] = deque(maxlen=self._settings.lookahead_steps + 8)
        self._prefetcher = Prefetcher(self._fetch_ahead)
        self._open: Recent[int, Descriptor] = Recent(_MAX_OPEN_FILES)
        self._num_ranges: Counter[int] = Counter()
        self._hosts_without_ranges: set[str] = set()
        self._without_room: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_urls", "_sizes", "_digests", "_indexes", "_settings")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cache = None
        self._start()


def open_remote_shards(
    where: str, patterns: Sequence[str], index_dir: Path | None, settings: CacheSettings
) -> tuple[RemoteShards, Manifest]:
    """Find the shards that some URLs mean, and what is in them.

    Raises:
        DataError: there are none, they cannot be read, or they have no index and none is cheap to make.
    """
    known = list_shards(where, patterns)
    indexes = RemoteIndexes(index_dir)
    manifest = describe_remote_shards(where, known, indexes, settings, MAX_FIRST_USE_BYTES)
    if settings.mode != "range":
        ShardCache(settings.dir, settings.max_bytes)  # says now if it cannot be written
    return RemoteShards(list(known), manifest, indexes, settings), manifest


def index_urls(patterns: Sequence[str], index_dir: Path) -> Manifest:
    """Index the shards that some URLs mean, however long that takes; copies are made and removed again.

    Args:
        patterns: URLs, with braces, directories and globs as in a source's path.
        index_dir: where the indexes are kept.

    Raises:
        DataError: there are no such shards, or one of them is damaged or cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="vlm-dist-cache-") as folder:
        settings = CacheSettings(dir=Path(folder))
        return describe_remote_shards("index", list_shards("index", patterns), RemoteIndexes(index_dir), settings)
