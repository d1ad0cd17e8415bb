"""Pipes and compressed shards: written to a file once, then like any shard."""

from __future__ import annotations

import gzip
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.storage.conftest import NUM_SHARDS, ROWS, Opening, read_all
from tests.storage.servers import Faults
from vlm_dist.data.storage.remote import shard_cache
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
        (
            "exec yes",
            r"no room in the cache: the limit is 30.0 MB(.|\n)*data.cache.max_size(.|\n)*vlm-dist shards build",
        ),
    ],
)
def test_pipes_that_fail(shards: Path, tmp_path: Path, opening: Opening, command: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opening("pipe:" + command.format(shard=shards / "train-000000.tar"), max_bytes=30_000_000)
    assert not list((tmp_path / "cache" / "spool").iterdir())
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
    with pytest.raises(DataError, match=r"train-000000.tar.\w+ cannot be read|truncated"):
        opening(str(packed / f"*.tar.{ending}"))


def pack(shards: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for shard in shards.glob("*.tar"):
        (folder / f"{shard.name}.gz").write_bytes(gzip.compress(shard.read_bytes(), 1))
    return folder


def test_the_same_shards_written_again_elsewhere_are_the_same_data(
    shards: Path, tmp_path: Path, opening: Opening
) -> None:
    first = opening(str(pack(shards, tmp_path / "a") / "*.tar.gz"))
    again = opening(str(pack(shards, tmp_path / "b" / "c") / "*.tar.gz"), dir=tmp_path / "other")
    assert first.manifest_hash == again.manifest_hash
    command = f"pipe:SIG=x; cat {shards}/train-{{000000..000002}}.tar"
    first, again = opening(command), opening(command, dir=tmp_path / "other")
    assert first.manifest_hash == again.manifest_hash
    other = shards / "train-000000.tar"
    other.write_bytes(other.read_bytes().replace(b"q0", b"Q0"))
    assert opening(command, dir=tmp_path / "third").manifest_hash != first.manifest_hash


def test_a_command_with_a_new_signature_is_the_same_one(
    shards: Path, tmp_path: Path, opening: Opening, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    runs = tmp_path / "runs"
    command = f"pipe:echo run >> {runs}; SIG_TOKEN=%s; : 'https://h/a.tar?sig=%s'; cat {shards}/train-000000.tar"
    first, again = opening(command % ("geheim1", "geheim1")), opening(command % ("geheim2", "geheim2"))
    assert first.manifest_hash == again.manifest_hash
    assert runs.read_text() == "run\n"
    assert "writing pipe:echo" in caplog.text and "geheim" not in caplog.text
    said = "https://me:geheim@h?sig=geheim Authorization: Bearer geheim"
    with pytest.raises(DataError, match="ended with status 2") as error:
        opening(f"pipe:curl -u me:geheim https://h; echo '{said}' >&2; exit 2")
    assert "geheim" not in str(error.value)


def test_commands_that_differ_in_a_secret_alone_are_different_shards(shards: Path, opening: Opening) -> None:
    source = opening(f"pipe:TOKEN={{000000..000002}}; cat {shards}/train-$TOKEN.tar")
    assert read_all(source) == read_all(opening(str(shards)))[: 3 * ROWS]


def test_what_is_spooled_counts_within_the_limit_and_stays(
    server: tuple[str, Faults], shards: Path, tmp_path: Path, opening: Opening
) -> None:
    limit = int(4.5 * (shards / "train-000000.tar").stat().st_size)
    remote = opening(server[0], mode="whole", max_bytes=limit)
    for row in range(0, 4 * ROWS, ROWS):
        remote.read(row)
    command = f"pipe:cat {shards}/train-{{000000..000002}}.tar"
    spooled = opening(command, max_bytes=limit)  # copies that can be fetched again make room
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1
    assert len(read_all(remote)) == NUM_SHARDS * ROWS
    assert len(read_all(spooled)) == 3 * ROWS
    with pytest.raises(DataError, match=r"no room in the cache: the limit(.|\n)*delete what no run needs in .*spool"):
        opening(f"pipe:cat {shards}/train-{{000003..000004}}.tar", max_bytes=limit)


def test_a_part_of_the_disk_stays_free(
    shards: Path, tmp_path: Path, opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "_MIN_FREE_SHARE", 1.0)
    with pytest.raises(DataError, match=r"pipe:cat .*cannot be written: .*no room in the cache: the disk is full"):
        opening(f"pipe:cat {shards}/train-000000.tar")
    assert not list((tmp_path / "cache").rglob("*.tar*"))


def test_kinds_are_not_mixed_in_one_source(shards: Path, opening: Opening) -> None:
    with pytest.raises(DataError, match="cannot stand in one source"):
        opening(["pipe:cat x.tar", str(shards)])
