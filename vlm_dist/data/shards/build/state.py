"""How far a build has come: `<prefix>-build.json`, written after every shard, and the lock that keeps builds apart."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlm_dist.data.index.manifest import BUILD_NOTE_SUFFIX, ShardEntry
from vlm_dist.data.index.shard_index import INDEX_SUFFIX, read_index, replacing
from vlm_dist.data.shards.build.settings import BuildSettings
from vlm_dist.data.shards.writer import make_directory
from vlm_dist.errors import DataError

_VERSION = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BuildState:
    """A build after a finished shard.

    Attributes:
        identity: settings that the bytes depend on.
        input: stamp of the records.
        position: records of the order that are used up.
        num_shards: that are complete.
        report_bytes: of the report that belong to these records.
        skipped: class -> records that were left out.
        messages_column: column of conversations, if there is one.
        is_complete: nothing is left to do.
    """

    identity: Mapping[str, Any]
    input: str
    position: int = 0
    num_shards: int = 0
    report_bytes: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    messages_column: str | None = None
    is_complete: bool = False
    version: int = _VERSION

    def write(self, path: Path) -> None:
        """Write it atomically."""
        with replacing(path) as stream:
            stream.write((json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode())


def state_path(settings: BuildSettings) -> Path:
    """Where the state of a build is."""
    return settings.out / (settings.prefix + BUILD_NOTE_SUFFIX)


def report_path(settings: BuildSettings) -> Path:
    """Where the records are named that a build leaves out."""
    return settings.out / f"{settings.prefix}-build-report.jsonl"


def read_state(settings: BuildSettings) -> BuildState | None:
    """Read the state of a stopped build of the same settings.

    Returns:
        None where there is none.

    Raises:
        DataError: it is damaged, or the settings were others.
    """
    path = state_path(settings)
    try:
        state = BuildState(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); build anew with --overwrite") from error
    if state.version != _VERSION:
        raise DataError(f"{path}: of another version of this command; build anew with --overwrite")
    now = json.loads(json.dumps(settings.identity))
    changed = [name for name in now if now[name] != state.identity.get(name)]
    if changed:
        was = "; ".join(f"{name} was {state.identity.get(name)!r}, is {now[name]!r}" for name in changed)
        raise DataError(
            f"{path}: the build to resume had other settings ({was}); give the same, or build anew with --overwrite"
        )
    return state


def finished_shards(settings: BuildSettings, num_shards: int) -> tuple[list[ShardEntry], list[str]]:
    """Describe the shards that a stopped build has finished.

    Returns:
        The shards, and the keys of all their samples.

    Raises:
        DataError: one is missing or was changed.
    """
    entries, keys = [], []
    for number in range(num_shards):
        shard = settings.out / f"{settings.prefix}-{number:06d}.tar"
        index = read_index(shard.with_name(shard.name + INDEX_SUFFIX))
        if index is None or not shard.is_file() or shard.stat().st_size != index.num_bytes:
            raise DataError(
                f"{shard}: finished by the build to resume, but now missing or changed; build anew with --overwrite"
            )
        entries.append(ShardEntry.of(shard.name, index))
        keys += index.keys.to_pylist()
    return entries, keys


def remove_leavings(settings: BuildSettings) -> None:
    """Remove half shards of builds that were killed."""
    for path in settings.out.glob(f".{settings.prefix}-[0-9]*.tar.*.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def only_build(directory: Path) -> Iterator[None]:
    """Hold a directory against other builds, which would write the same manifest; it is made if it is missing.

    Raises:
        DataError: another build holds it.
    """
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    make_directory(directory)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{directory}: another build is writing here; wait for it, or choose another --out"
            ) from error
        except OSError as error:  # some network file systems lock no directories
            log.debug("%s: cannot be locked: %s", directory, error)
        yield
    finally:
        os.close(descriptor)
        for folder in made:  # a build that ends before it has written anything leaves nothing behind
            try:
                folder.rmdir()
            except OSError:
                break
