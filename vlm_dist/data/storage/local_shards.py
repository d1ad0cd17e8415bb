"""Shards on a local or shared file system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.index.open_index import load_or_scan
from vlm_dist.data.index.shard_index import ShardIndex
from vlm_dist.data.storage.open_files import OpenFiles


class LocalShards:
    """Reads shards in place.

    Args:
        paths: the shards.
        index_dir: where indexes lie that are not beside their shard.
    """

    def __init__(self, paths: Sequence[str | Path], index_dir: Path | None = None) -> None:
        self._files = OpenFiles(paths)
        self._index_dir = index_dir

    def __len__(self) -> int:
        return len(self._files.paths)

    def name(self, shard: int) -> str:
        """File name, for people."""
        return self._files.paths[shard].rpartition("/")[2]

    def place(self, shard: int) -> str:
        """Path, for errors."""
        return self._files.paths[shard]

    def index(self, shard: int, digest: str) -> ShardIndex:
        """Load an index.

        Raises:
            DataError: the shard is gone, or is not the one that the digest belongs to.
        """
        return load_or_scan(Path(self._files.paths[shard]), self._index_dir, digest)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Read exactly `size` bytes.

        Raises:
            DataError: the file is gone or shorter, or the storage fails.
        """
        return self._files.read(shard, offset, size)

    def will_read(self, spans: Mapping[int, NDArray[np.int64]]) -> None:
        """Have the operating system read ahead, into the memory that all processes of this machine share."""
        for shard, wanted in spans.items():
            self._files.will_read(shard, wanted.tolist())
