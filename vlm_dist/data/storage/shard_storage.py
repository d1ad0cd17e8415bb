"""What a tar source needs of the place where its shards are, and which place a path means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.index.describe import describe_shards
from vlm_dist.data.index.manifest import Manifest
from vlm_dist.data.index.shard_index import ShardIndex
from vlm_dist.data.storage.find import COMPRESSED, find_files
from vlm_dist.data.storage.local_shards import LocalShards
from vlm_dist.errors import DataError


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """How copies of data are kept on this machine.

    Attributes:
        dir: of the copies; None: a folder of this user in the directory for temporary files.
        max_bytes: of all copies together.
        mode: `whole` copies shards, `range` reads samples where they are, `auto` copies them and reads samples where
            they are until the copy is there, and where there is no room for it.
        lookahead_steps: how many steps before it is needed a shard is fetched.
        stage_files: shards in files are copied, too.
    """

    dir: Path | None = None
    max_bytes: int = 200 * 10**9
    mode: Literal["auto", "whole", "range"] = "auto"
    lookahead_steps: int = 64
    stage_files: bool = False


class ShardStorage(Protocol):
    """The shards of one source, by number; picklable, opens what it needs lazily (also after a fork or spawn)."""

    def __len__(self) -> int: ...

    def name(self, shard: int) -> str:
        """File name, for people."""

    def place(self, shard: int) -> str:
        """Path or URL, for errors; without what must not be shown."""

    def index(self, shard: int, digest: str) -> ShardIndex:
        """Load the index of this digest."""

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Read exactly `size` bytes."""

    def will_read(self, spans: Mapping[int, NDArray[np.int64]]) -> None:
        """Be told what will be read soon: shard -> [n, 2] start and stop in bytes, the nearest shard first."""


def is_remote(pattern: str) -> bool:
    """Whether a path is a URL."""
    return "://" in pattern and not pattern.startswith("pipe:")


def open_storage(
    where: str, patterns: Sequence[str], index_dir: Path | None, cache: CacheSettings
) -> tuple[ShardStorage, Manifest]:
    """Find the shards that some patterns mean, and what is in them.

    Args:
        where: names the source in errors.
        patterns: directories, files, globs, brace patterns, URLs, or `pipe:` commands; all of one kind.
        index_dir: where indexes go that cannot lie beside the data.
        cache: for data that is not in local files.

    Raises:
        DataError: if there is no such data, or it cannot be used.
    """
    if any(map(is_remote, patterns)):
        from vlm_dist.data.storage.remote.shards import open_remote_shards

        try:
            return open_remote_shards(where, patterns, index_dir, cache)
        except DataError as error:  # a URL alone does not say which of the sources it belongs to
            if str(error).startswith(f"{where}: "):
                raise
            raise DataError(f"{where}: {error}") from error
    if any(pattern.startswith("pipe:") or pattern.endswith(COMPRESSED) for pattern in patterns):
        from vlm_dist.data.storage.spool import spool_shards

        spooled = spool_shards(where, patterns, cache)
        described = describe_shards([one.path for one in spooled], index_dir).shards
        manifest = Manifest(tuple(replace(entry, name=one.name) for entry, one in zip(described, spooled, strict=True)))
        return LocalShards([one.path for one in spooled], index_dir), manifest
    paths = list(dict.fromkeys(path for pattern in patterns for path in find_files(where, pattern, (".tar",))))
    if not paths:
        raise DataError(f"{where}: no shards")
    shown = patterns[0] if len(patterns) == 1 else None
    whole = [folder for pattern in patterns if (folder := Path(pattern).expanduser()).is_dir()]
    manifest = describe_shards(paths, index_dir, shown, whole)
    if cache.stage_files:
        from vlm_dist.data.storage.staged_shards import StagedShards

        return StagedShards(paths, manifest, index_dir, cache), manifest
    return LocalShards(paths, index_dir), manifest
