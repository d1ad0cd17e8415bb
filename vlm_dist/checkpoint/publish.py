"""Making a directory appear whole or not at all, also when the machine dies in the middle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from vlm_dist.errors import CheckpointError

#: Of names that start with a dot: being written, being replaced, being deleted, being written by all ranks.
_ENDINGS = ("writing", "old", "deleting", "slices")


def publish_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Write a directory beside its target, make it durable, and move it there in one step.

    A reader sees the old directory, or the new one, or (only if the process dies between two renames) neither; never a
    mixture. What a crash leaves behind has a name that starts with a dot; see `leftovers`.

    Args:
        target: path of the directory; one that is there is replaced.
        write: fills the directory that it is given.

    Raises:
        CheckpointError: it could not be written, for example because the disk is full.
    """
    parent = target.parent
    fresh = parent / f".{target.name}.writing"
    old = parent / f".{target.name}.old"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in (fresh, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        fresh.mkdir()
        write(fresh)
        for path in fresh.iterdir():
            make_durable(path)
        make_durable(fresh)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        make_durable(parent)
        if old.exists():
            shutil.rmtree(old)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)  # gives a full disk its space back
        raise CheckpointError(f"{target} could not be written: {error}") from error


def being_sliced(target: Path) -> Path:
    """Where the ranks leave their files of a checkpoint."""
    return target.parent / f".{target.name}.slices"


def leftovers(directory: Path) -> Iterator[tuple[Path, Path]]:
    """What killed processes left in a directory, each with the name that it was on its way to or from."""
    for path in sorted(directory.glob(".*")):
        stem, _, ending = path.name[1:].rpartition(".")
        if ending in _ENDINGS and stem and path.is_dir():
            yield path, directory / stem


def remove_directory(path: Path) -> None:
    """Delete a directory so that it is never seen half deleted.

    Raises:
        CheckpointError: it could not be deleted.
    """
    doomed = path.parent / f".{path.name}.deleting"
    try:
        if doomed.exists():
            shutil.rmtree(doomed)
        path.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        raise CheckpointError(f"{path} could not be deleted: {error}") from error


def make_durable(path: Path) -> None:
    """Wait until a file or a directory's entries are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
