"""Copies on this machine: one download for all processes, within the limit, whatever dies in between."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.storage.conftest import NUM_SHARDS, ROWS, Opening, picture, read_all
from tests.storage.reading import read_in_child
from tests.storage.servers import Faults
from vlm_dist.data.storage.remote.shard_cache import NoRoomError, ShardCache
from vlm_dist.errors import DataError

Server = tuple[str, Faults]
SHARD_BYTES = 190_000  # a little more than one has


def copies(folder: Path) -> list[str]:
    return sorted(path.name[-9:-4] for path in folder.glob("*.tar"))


def open_files() -> list[str]:
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(path.readlink()))
    return found


def wait_until(is_so: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_processes_that_want_the_same_shard_download_it_once(server: Server, opening: Opening, method: str) -> None:
    url, faults = server
    faults.seconds_per_chunk = 0.01  # 0.1 s a shard, so that all of them come while it is fetched
    source = opening(url, mode="whole")
    source.read(0)  # the parent has connections and threads
    context: Any = multiprocessing.get_context(method)
    results = context.Queue()
    rows = list(range(0, NUM_SHARDS * ROWS, 4))
    children = [context.Process(target=read_in_child, args=(source, rows, results)) for _ in range(2)]
    for child in children:
        child.start()
    assert [results.get(timeout=60) for _ in children] == [[len(picture(0))] * len(rows)] * 2
    for child in children:
        child.join(30)
    assert {name: faults.whole()[name] for name in faults.whole() if name.endswith(".tar")} == {
        f"train-{number:06d}.tar": 1 for number in range(NUM_SHARDS)
    }


def test_what_is_announced_is_fetched_before_it_is_read(server: Server, tmp_path: Path, opening: Opening) -> None:
    url, faults = server
    source = opening(url)
    source.will_read(np.array([25, 8, 9, 26]))
    wait_until(lambda: copies(tmp_path / "cache") == ["00001", "00003"])
    asked = len(faults.requests)
    reader = pickle.loads(pickle.dumps(source))  # as in a worker
    assert [reader.read(row).fields["question"] for row in (8, 25, 26)] == ["q8", "q25", "q26"]
    assert len(faults.requests) == asked


def test_samples_are_read_in_place_until_the_copy_is_there(server: Server, tmp_path: Path, opening: Opening) -> None:
    url, faults = server
    source = opening(url)
    assert source.read(3).fields["jpg"] == picture(3)
    (asked,) = [wanted for name, wanted in faults.requests if name == "train-000000.tar"]
    assert asked.startswith("bytes=") and not copies(tmp_path / "cache")
    assert read_all(source)[8:16] == read_all(opening(url, mode="whole"))[8:16]  # nobody announces: copied after all
    assert len(copies(tmp_path / "cache")) == NUM_SHARDS


def test_a_cache_smaller_than_the_data(server: Server, tmp_path: Path, opening: Opening) -> None:
    url, _ = server
    expected = read_all(opening(url, mode="range"))
    source = opening(url, mode="whole", max_bytes=2 * SHARD_BYTES)
    cache = ShardCache(tmp_path / "cache", 2 * SHARD_BYTES)
    for row in range(len(source)):
        assert source.read(row).fields == expected[row]
        assert cache.num_bytes() <= 2 * SHARD_BYTES
    assert copies(tmp_path / "cache") == ["00004", "00005"]  # what was used last
    rng = np.random.default_rng(0)
    for row in rng.permutation(len(source))[:20].tolist():
        assert source.read(row).fields == expected[row]
    assert not [link for link in open_files() if str(tmp_path) in link and "deleted" in link]  # their space is free


def test_processes_take_turns_in_a_cache_of_one_shard(server: Server, tmp_path: Path, opening: Opening) -> None:
    source = opening(server[0], mode="whole", max_bytes=SHARD_BYTES)
    context: Any = multiprocessing.get_context("fork")
    results = context.Queue()
    rows = list(range(0, NUM_SHARDS * ROWS, 3))
    children = [context.Process(target=read_in_child, args=(source, rows[turn:], results)) for turn in range(3)]
    for child in children:
        child.start()
    source.will_read(np.arange(NUM_SHARDS * ROWS))  # and one that fetches ahead
    assert sorted(len(results.get(timeout=60)) for _ in children) == [14, 15, 16]
    for child in children:
        child.join(30)
    wait_until(lambda: not list((tmp_path / "cache").glob("*.part")))
    assert len(copies(tmp_path / "cache")) == 1


def test_fetching_ahead_leaves_alone_what_is_needed_before(server: Server, tmp_path: Path, opening: Opening) -> None:
    url, _ = server
    source = opening(url, max_bytes=3 * SHARD_BYTES, lookahead_steps=4)
    for shard in range(NUM_SHARDS):
        source.will_read(np.array([shard * ROWS]))
        time.sleep(0.05)
    wait_until(lambda: len(copies(tmp_path / "cache")) == 3)
    time.sleep(0.2)
    assert copies(tmp_path / "cache") == ["00000", "00001", "00002"]  # the nearest; the others have to wait


def test_what_was_not_used_for_longest_goes_first(server: Server, tmp_path: Path, opening: Opening) -> None:
    url, _ = server
    source = opening(url, mode="whole", max_bytes=3 * SHARD_BYTES)
    for shard in (0, 1, 2):
        source.read(shard * ROWS)
    source.will_read(np.array([0]))
    source.read(3 * ROWS)
    assert copies(tmp_path / "cache") == ["00000", "00002", "00003"]


def test_a_process_that_dies_while_it_downloads(server: Server, tmp_path: Path, opening: Opening) -> None:
    url, faults = server
    source = opening(url, mode="whole")
    faults.seconds_per_chunk = 0.3
    context: Any = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=read_in_child, args=(source, [0], results))
    child.start()
    wait_until(lambda: list((tmp_path / "cache").glob("*.part")))
    other = context.Process(target=read_in_child, args=(source, [1], results))
    other.start()  # waits for the first
    time.sleep(0.2)
    faults.seconds_per_chunk = 0.0
    os.kill(child.pid, signal.SIGKILL)
    assert results.get(timeout=30) == [len(picture(1))]
    child.join(), other.join()
    (tmp_path / "cache" / "half.tar.part").write_bytes(b"left behind")
    opening(url)
    assert not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.parametrize("mode", ["auto", "whole"])
def test_a_full_disk(
    server: Server, tmp_path: Path, opening: Opening, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = server
    source = opening(url, mode=mode)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    if mode == "whole":
        with pytest.raises(DataError, match=r"no room in the cache: the disk is full(.|\n)*data.cache.dir"):
            source.read(0)
    else:
        assert [source.read(row).fields["question"] for row in range(8)] == [f"q{row}" for row in range(8)]
    assert list((tmp_path / "cache").glob("*.tar*")) == []


def test_a_limit_below_one_shard(server: Server, opening: Opening) -> None:
    url, faults = server
    assert [row["question"] for row in read_all(opening(url, max_bytes=1000))] == [f"q{i}" for i in range(48)]
    faults.honours_ranges = False
    monkey = opening(url.replace("127.0.0.1", "localhost"), max_bytes=1000)
    with pytest.raises(DataError, match=r"no room in the cache: the limit is 0.0 MB, and this shard alone has 0.2 MB"):
        monkey.read(0)


def test_a_directory_that_cannot_be_written(server: Server, tmp_path: Path, opening: Opening) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written .* set data.cache.dir"):
        opening(server[0], dir=tmp_path / "file" / "cache")


def test_room_is_reserved_before_it_is_written(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1000)

    def download(descriptor: int, on_bytes: Any) -> int:
        assert cache.num_bytes() == 700
        with pytest.raises(NoRoomError):
            cache.fetch("b", 700, download, keep=())
        os.pwrite(descriptor, b"x" * 700, 0)
        return 700

    assert cache.fetch("a", 700, download).read(0, 800) == b"x" * 700


def test_objects_of_unknown_size_take_room_as_they_grow(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 10**9)

    def download(descriptor: int, on_bytes: Any) -> int:
        for number in range(1, 4):
            on_bytes(number * 50_000_000)
            os.pwrite(descriptor, b"end", number * 50_000_000 - 3)
        return 150_000_000

    assert cache.fetch("a", None, download).read(149_999_990, 20) == bytes(7) + b"end"
    assert cache.num_bytes() == 150_000_000
