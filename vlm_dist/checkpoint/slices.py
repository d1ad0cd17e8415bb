"""Checkpoints to which every rank adds a file: each writes its own share, rank 0 puts the files together.

The ranks' threads meet in no collective. A rank leaves its file, and beside it what is known of it, in a directory that
all ranks see; rank 0 waits for all of them, moves them into the checkpoint, and publishes it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm_dist.checkpoint.files import FileSet
from vlm_dist.checkpoint.publish import being_sliced, make_durable
from vlm_dist.checkpoint.slice_reader import PARTS, slice_name
from vlm_dist.engine import ParameterSlice
from vlm_dist.errors import CheckpointError

#: Between two looks for the other ranks' files.
_LOOK_SECONDS = 0.2
#: How long rank 0 waits for them; a rank that is gone ends the run long before, one that fails to write tells so.
PATIENCE_SECONDS = 3600.0


def write_slices(target: Path, rank: int, world_size: int, token: str, slices: Sequence[ParameterSlice]) -> None:
    """Write one rank's file, and beside it what rank 0 has to know of it.

    Args:
        target: the checkpoint's directory, which is not there yet.
        rank: this one.
        world_size: number of files.
        token: of this save: what another one has left is not taken for its file.
        slices: of this rank.

    Raises:
        CheckpointError: it could not be written.
    """
    directory = being_sliced(target)
    name = slice_name(rank, world_size)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files = FileSet(directory)
        parts = {f"{part}/{one.name}/{one.start}": getattr(one.state, part) for part in PARTS for one in slices}
        files.write_tensors(name, parts)
        make_durable(directory / name)
        told = directory / f"{name}.json"
        fresh = told.with_suffix(".tmp")
        fresh.write_text(json.dumps({"token": token, **files.facts[name]}), encoding="utf-8")
        fresh.rename(told)
    except OSError as error:
        raise CheckpointError(f"{target}: rank {rank} could not write {directory / name}: {error}") from error


def await_slices(
    target: Path, world_size: int, token: str, is_given_up: Callable[[], bool]
) -> dict[Path, dict[str, Any]]:
    """Wait until all ranks have written.

    Args:
        target: the checkpoint's directory.
        world_size: number of files.
        token: of this save.
        is_given_up: asked now and then.

    Returns:
        The files, with their `bytes` and `sha256`.

    Raises:
        CheckpointError: they did not come.
    """
    directory = being_sliced(target)
    missing = [slice_name(rank, world_size) for rank in range(world_size)]
    found: dict[Path, dict[str, Any]] = {}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while missing:
        still = []
        for name in missing:
            facts = _facts(directory / f"{name}.json")
            if facts is not None and facts.pop("token") == token:
                found[directory / name] = facts
            else:
                still.append(name)
        missing = still
        if missing and (is_given_up() or time.monotonic() > deadline):
            raise CheckpointError(f"{target} could not be written: {', '.join(missing[:4])} did not come")
        if missing:
            time.sleep(_LOOK_SECONDS)
    return found


def _facts(path: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there yet
        return None
    return facts if isinstance(facts, dict) and "token" in facts else None


def remove_slices(directory: Path) -> None:
    """Remove the directory that the files were moved out of; one that stays does no harm."""
    shutil.rmtree(directory, ignore_errors=True)
