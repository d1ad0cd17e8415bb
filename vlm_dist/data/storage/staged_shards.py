"""Shards on a file system that nodes share, through copies on a disk of this node.

The same copies, made ahead in the same way, as of shards on a server: each node has those that its ranks read, which
with `balance_scope: node` are its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vlm_dist.data.index.manifest import Manifest
from vlm_dist.data.index.open_index import load_or_scan
from vlm_dist.data.index.shard_index import ShardIndex
from vlm_dist.data.storage.open_files import OpenFiles
from vlm_dist.data.storage.remote.shard_cache import ShardCache
from vlm_dist.data.storage.remote.shards import Bytes, RemoteShards
from vlm_dist.data.storage.remote.store import RemoteObject
from vlm_dist.data.storage.shard_storage import CacheSettings
from vlm_dist.errors import DataError

_CHUNK_BYTES = 16 * 1024 * 1024


class StagedShards(RemoteShards):
    """Reads shards through copies; until a copy is there, in place.

    Args:
        paths: the shards.
        manifest: what is in them.
        index_dir: where indexes lie that are not beside their shard.
        settings: of the copies.

    Raises:
        DataError: the directory of the copies cannot be written.
    """

    def __init__(
        self, paths: Sequence[Path], manifest: Manifest, index_dir: Path | None, settings: CacheSettings
    ) -> None:
        urls = [path.absolute().as_uri() for path in paths]
        super().__init__(urls, manifest, _FileIndexes(index_dir), settings)
        ShardCache(settings.dir, settings.max_bytes)  # says now if it cannot be written

    def name(self, shard: int) -> str:
        """File name, for people."""
        return Path(self.place(shard)).name

    def place(self, shard: int) -> str:
        """Path, for errors."""
        return _path_of(self._urls[shard])

    def _store(self, url: str) -> Bytes:
        return _Files()


@dataclass(frozen=True, slots=True)
class _FileIndexes:
    index_dir: Path | None

    def load(self, url: str, digest: str) -> ShardIndex:
        """Load the index that lies beside a shard, or in the directory of indexes."""
        return load_or_scan(Path(_path_of(url)), self.index_dir, digest)


class _Files:
    """Files, read as objects of a store are."""

    def read(self, url: str, start: int, stop: int, num_bytes: int) -> bytes:
        """Read a range of bytes, all of it."""
        return OpenFiles([_path_of(url)]).read(0, start, stop - start)

    def download(self, url: str, expected: RemoteObject, descriptor: int, on_bytes: Callable[[int], None]) -> int:
        """Write a file to the start of an open file."""
        path = _path_of(url)
        files = OpenFiles([path])
        try:
            size = os.stat(path).st_size  # noqa: PTH116 - as everywhere here, a string
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        if expected.num_bytes not in (None, size):
            raise DataError(
                f"{path}: the shard has changed since it was indexed (size {size}, {expected.num_bytes} was expected); "
                "put the old one back, or index it again (vlm-dist shards index) and start a new run"
            )
        for position in range(0, size, _CHUNK_BYTES):
            data = files.read(0, position, min(_CHUNK_BYTES, size - position))
            os.pwrite(descriptor, data, position)
            on_bytes(position + len(data))
        return size


def _path_of(url: str) -> str:
    return unquote(urlsplit(url).path)
