"""Shards of a file system that nodes share, copied to a disk of this one."""

from __future__ import annotations

import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from tests.storage.conftest import NUM_SHARDS, ROWS, Opening, read_all
from vlm_dist.errors import DataError


@pytest.fixture
def shared(shards: Path, tmp_path: Path) -> Path:
    """Shards with the names that a URL would have to write otherwise."""
    folder = tmp_path / "shared #1 50%?"
    shutil.copytree(shards, folder)
    return folder


def copies(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*.tar"))


@pytest.mark.parametrize("mode", ["whole", "auto"])
def test_what_is_read_is_the_same_and_only_what_is_read_is_copied(
    mode: str, shared: Path, tmp_path: Path, opening: Opening
) -> None:
    plain, staged = opening(str(shared)), opening(str(shared), stage_files=True, mode=mode)
    assert staged.manifest_hash == plain.manifest_hash  # a run may go on with either
    for row in range(ROWS):
        assert staged.read(row).fields == plain.read(row).fields
    assert len(copies(tmp_path)) == 1
    assert read_all(pickle.loads(pickle.dumps(staged))) == read_all(plain)
    assert len(copies(tmp_path)) == NUM_SHARDS


def test_shards_are_copied_before_they_are_read(shared: Path, tmp_path: Path, opening: Opening) -> None:
    source = opening(str(shared), stage_files=True)
    source.will_read(np.arange(2 * ROWS))
    deadline = time.monotonic() + 20
    while len(copies(tmp_path)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_copy_is_read_and_not_the_file(shared: Path, tmp_path: Path, opening: Opening) -> None:
    source = opening(str(shared), stage_files=True, mode="whole")
    expected = read_all(source)
    again = opening(str(shared), stage_files=True, mode="whole")
    for path in shared.glob("*.tar"):
        before = path.stat()
        path.write_bytes(bytes(before.st_size))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read_all(again) == expected


def test_a_shard_that_changes_after_it_was_indexed_is_refused(shared: Path, opening: Opening) -> None:
    source = opening(str(shared), stage_files=True, mode="whole")
    first = min(shared.glob("*.tar"))
    with first.open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match="has changed since it was indexed"):
        source.read(0)
    first.unlink()
    with pytest.raises(DataError, match=first.name):
        source.read(0)


def test_a_shard_without_room_is_read_where_it_is(shared: Path, tmp_path: Path, opening: Opening) -> None:
    staged = opening(str(shared), stage_files=True, mode="auto", max_bytes=1000)
    assert read_all(staged) == read_all(opening(str(shared)))
    assert copies(tmp_path) == []


def test_a_directory_of_copies_that_cannot_be_written_is_named_at_once(shared: Path, opening: Opening) -> None:
    with pytest.raises(DataError, match=r"set data\.cache\.dir"):
        opening(str(shared), stage_files=True, dir=next(shared.glob("*.tar")) / "x")
