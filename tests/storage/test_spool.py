"""Pipes and compressed shards: written to a file once, then like any shard."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.storage.conftest import ROWS, Opening, read_all
from vlm_dist.errors import DataError


def test_a_pipe_gives_what_the_file_has_and_is_run_once(shards: Path, tmp_path: Path, opening: Opening) -> None:
    runs = shlex.quote(str(tmp_path / "runs"))
    path = f"pipe:echo run >> {runs}; cat {shlex.quote(str(shards))}/train-{{000000..000002}}.tar"
    source = opening(path)
    assert read_all(source) == read_all(opening(str(shards)))[: 3 * ROWS]
    assert source.shard_sizes == [ROWS] * 3
    assert opening(path).manifest_hash == source.manifest_hash
    assert (tmp_path / "runs").read_text() == "run\n" * 3


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo nobody is there >&2; exit 3", r"ended with status 3:\nnobody is there"),
        ("head -c 5000 {shard}; kill -9 $$", "ended with status -9"),
        ("head -c 5000 {shard}", "truncated"),
        ("echo '<html>'", "not a tar"),
        ("true", "empty"),
        ("exec yes", r"gives more than the 0\.\d GB that data.cache.max_size leaves(.|\n)*vlm-dist shards build"),
    ],
)
def test_pipes_that_fail(shards: Path, tmp_path: Path, opening: Opening, command: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opening("pipe:" + command.format(shard=shards / "train-000000.tar"), max_bytes=30_000_000)
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_pipe_that_failed_is_run_again(shards: Path, tmp_path: Path, opening: Opening) -> None:
    flag = tmp_path / "flag"
    path = f"pipe:test -e {flag} && cat {shards}/train-000000.tar"
    with pytest.raises(DataError, match="status 1"):
        opening(path)
    flag.touch()
    assert len(opening(path)) == ROWS


@pytest.mark.parametrize(("ending", "command"), [("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")])
def test_compressed_shards(shards: Path, tmp_path: Path, opening: Opening, ending: str, command: str) -> None:
    expected = read_all(opening(str(shards)))
    packed = tmp_path / "packed"
    packed.mkdir()
    module = {"gzip": "gzip", "bzip2": "bz2", "xz": "lzma"}[command]
    for shard in shards.glob("*.tar"):
        code = f"import {module}, sys; {module}.open(sys.argv[2], 'wb').write(open(sys.argv[1], 'rb').read())"
        subprocess.run([sys.executable, "-c", code, shard, packed / f"{shard.name}.{ending}"], check=True)
    source = opening(str(packed / f"train-{{000000..000005}}.tar.{ending}"))
    assert read_all(source) == expected
    damaged = packed / f"train-000000.tar.{ending}"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"cannot be written|truncated"):
        opening(str(packed / f"*.tar.{ending}"))


def test_kinds_are_not_mixed_in_one_source(shards: Path, opening: Opening) -> None:
    with pytest.raises(DataError, match="cannot stand in one source"):
        opening(["pipe:cat x.tar", str(shards)])
