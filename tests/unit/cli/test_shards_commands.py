"""`vlm-dist shards index|info|verify|show`, as a user runs them."""

import io
import json
import os
import subprocess
import sys
import tarfile
from types import ModuleType

import pytest

from tests.unit.data.samples import jpeg, mp4
from vlm_dist.cli.main import main
from vlm_dist.data.index.manifest import read_manifest
from vlm_dist.data.index.shard_index import INDEX_SUFFIX, read_index
from vlm_dist.data.shards import verify, verify_workers
from vlm_dist.data.shards.writer import ShardWriter
from vlm_dist.errors import SkipSample


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def samples(prefix, count=3):
    members = {}
    for i in range(count):
        members[f"{prefix}{i}.jpg"] = jpeg(40 + i, 30, i)
        members[f"{prefix}{i}.json"] = json.dumps({"question": f"what is {i}?", "answer": "x"}).encode()
    return members


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        write_tar(tmp_path / f"{name}.tar", samples(name))
    return tmp_path


def vlm_dist(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "vlm_dist.cli", "shards", *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_index_in_parallel_names_all_damaged_shards_and_indexes_the_others(folder):
    (folder / "b.tar").write_bytes((folder / "b.tar").read_bytes()[:3000])
    (folder / "d.tar").write_text("<!DOCTYPE html>")
    (folder / "e.tar").write_bytes(b"")
    done = vlm_dist("index", folder, "--workers", 2)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert "error: 3 of 5 shards damaged" in done.stderr
    for name, problem in (("b", "truncated after 3000 bytes"), ("d", "not a tar"), ("e", "the file is empty")):
        assert any(f"{name}.tar: {problem}" in line for line in done.stderr.splitlines())
    assert "2 of 5 shards indexed, 0 had an index; 6 samples" in done.stdout
    assert {path.name for path in folder.glob("*.arrow")} == {"a.tar" + INDEX_SUFFIX, "c.tar" + INDEX_SUFFIX}
    assert read_manifest(folder) is None


def test_index_skips_what_is_indexed_and_adds_checksums(folder, capsys):
    assert main(["shards", "index", str(folder / "{a,b}.tar")]) == 0
    assert not (folder / "manifest.json").exists()  # it would not describe the whole directory
    assert main(["shards", "index", str(folder / "*.tar")]) == 0
    assert "1 of 3 shards indexed, 2 had an index; 9 samples" in capsys.readouterr().out
    assert read_manifest(folder).num_samples == 9
    before = read_manifest(folder).hash
    assert main(["shards", "index", str(folder), "--checksums"]) == 0
    assert "3 of 3 shards indexed" in capsys.readouterr().out
    assert read_index(folder / ("a.tar" + INDEX_SUFFIX)).checksums is not None
    assert read_manifest(folder).hash == before  # a run that was begun before goes on
    assert main(["shards", "index", str(folder), "--force"]) == 0
    assert "3 of 3 shards indexed" in capsys.readouterr().out
    assert main(["shards", "index", str(folder), "--workers", "0"]) == 2
    assert main(["shards", "index", str(folder / "*.tgz")]) == 3


def test_info(folder, capsys):
    assert main(["shards", "info", str(folder)]) == 0
    assert "3 shards without an index" in capsys.readouterr().out
    with ShardWriter(folder, "w") as writer:
        writer.write({"__key__": "v", "mp4": mp4(8), "json": {"caption": "c"}})
    main(["shards", "index", str(folder)])
    capsys.readouterr()
    assert main(["shards", "info", str(folder), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["num_shards"], info["num_samples"], info["num_indexed"], info["num_with_checksums"]) == (4, 10, 4, 1)
    columns = {column["name"]: column for column in info["columns"]}
    assert columns["jpg"] == {"name": "jpg", "kind": "image", "filled": 0.9}
    assert columns["video"]["filled"] == 0.1
    assert {"question", "answer", "caption"} <= set(columns)
    lengths = {row["name"]: row for row in info["lengths"]}
    assert (lengths["image_width"]["min"], lengths["image_width"]["max"]) == (40, 42)
    assert (lengths["video_frames"]["median"], lengths["video_seconds"]["num_samples"]) == (8, 1)
    assert main(["shards", "info", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "4 shards" in text
    assert "90.0%" in text


def test_verify_finds_bit_rot_in_the_middle_of_a_picture(tmp_path):
    with ShardWriter(tmp_path, "s", max_samples=2) as writer:
        for i in range(4):
            writer.write({"__key__": f"k{i}", "jpg": jpeg(200, 200, i), "json": {"q": "x"}})
    shard = tmp_path / "s-000001.tar"
    data = bytearray(shard.read_bytes())
    offset, size = read_index(shard.with_name(shard.name + INDEX_SUFFIX)).members_of(1)["jpg"]
    data[offset + size // 2] ^= 0x10
    status = shard.stat()
    shard.write_bytes(data)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a failing disk would
    (tmp_path / "cut.tar").write_bytes(data[:5000])
    report = tmp_path / "report.jsonl"
    done = vlm_dist("verify", tmp_path, "--decode", "--workers", 2, "--report", report)
    assert done.returncode == 3
    assert "2 findings in 2 shards" in done.stderr
    found = {line["problem"]: line for line in map(json.loads, report.read_text().splitlines())}
    assert set(found) == {"shard", "content"}
    assert found["content"]["key"] == "k3"
    assert found["content"]["shard"] == str(shard)
    assert "truncated" in found["shard"]["message"]


def findings(path, decode=False):
    found = []
    verify_workers.verify_shards([path], decode=decode, on_finding=found.append, on_shard=lambda shard: None)
    return found


def events(path):
    return [event for event in verify.verify_shard(path, decode=True) if isinstance(event, verify.Finding)]


def test_verify_names_the_sample_that_cannot_be_decoded(tmp_path):
    members = samples("k") | {"x.jpg": b"no picture", "x.json": b"{}", "y.mp4": mp4(8)[:-900], "y.json": b"{}"}
    found = events(write_tar(tmp_path / "s.tar", members))
    assert [(one.key, one.member, one.problem) for one in found] == [("x", "jpg", "decode"), ("y", "mp4", "decode")]


def test_verify_compares_index_and_shard(tmp_path):
    shard = write_tar(tmp_path / "s.tar", samples("k"))
    main(["shards", "index", str(shard)])
    assert events(shard) == []
    write_tar(shard, samples("k") | {"k1.jpg": jpeg(41, 30, 9).ljust(len(samples("k")["k1.jpg"]))})
    assert next(one.problem for one in events(shard)) in ("content", "index")
    write_tar(shard, samples("z"))
    assert [one.problem for one in events(shard)] == ["index"]
    write_tar(shard, samples("k", 30))
    assert [one.problem for one in events(shard)] == ["index"]


class Crash:
    """Ends the process that decodes a certain picture, or keeps it."""

    def __call__(self, data):
        if data == b"crash":
            os.kill(os.getpid(), 11)
        if data == b"hang":
            import time

            time.sleep(600)
        if data == b"bad":
            raise SkipSample("decode", "cannot be decoded")


def crashing_work(pipe, index_dir, decode):
    """What a worker process does, with a decoder that crashes."""
    for name, decoder in (("images", "decode_image"), ("video", "decode_video")):
        module = ModuleType(name)  # the real ones take seconds to import
        setattr(module, decoder, Crash())
        sys.modules[f"vlm_dist.data.media.{name}"] = module
    verify_workers._work(pipe, index_dir, decode)


def test_a_decoder_that_crashes_or_hangs_costs_one_finding(tmp_path, monkeypatch):
    contents = [b"fine", b"crash", b"bad", b"hang", b"bad"]
    members = {f"k{i}.jpg": data for i, data in enumerate(contents)}
    shard = write_tar(tmp_path / "s.tar", members)
    start = verify_workers._start

    def start_crashing(task, index_dir, decode):
        with monkeypatch.context() as patch:
            patch.setattr(verify_workers, "_work", crashing_work)
            return start(task, index_dir, decode)

    monkeypatch.setattr(verify_workers, "_start", start_crashing)
    monkeypatch.setattr(verify_workers, "_DECODE_SECONDS", 2.0)
    found = [(one.key, one.problem) for one in findings(shard, decode=True)]
    assert found == [("k1", "crash"), ("k2", "decode"), ("k3", "timeout"), ("k4", "decode")]


def test_show_prints_and_extracts_a_sample(tmp_path, capsys):
    shard = write_tar(
        tmp_path / "s.tar",
        {
            "../evil/a1.jpg": jpeg(40, 30, orientation=6),
            "../evil/a1.json": json.dumps({"answer": "x" * 9000}).encode(),
            "../evil/a1.txt": b"red \x1b[31m text",
            "b1.mp4": mp4(8),
            "b1.json": b"{broken",
            "b1.txt": b"\xff",
        },
    )
    assert main(["shards", "show", str(shard), "../evil/a1", "--extract", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "sample 1 of 2" in text
    assert "image" in text
    assert "RGB, JPEG" in text
    assert len(text) < 6000
    assert "more)" in text
    assert "\x1b" not in text
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".jpg", ".json", ".txt"]
    assert main(["shards", "show", str(shard), "../evil/a1", "--extract", str(tmp_path / "out")]) == 3
    assert "nothing is overwritten" in capsys.readouterr().err
    assert main(["shards", "show", str(tmp_path), "source/s.tar:b1"]) == 0
    text = capsys.readouterr().out
    assert "8 frames, " in text
    assert "not JSON" in text
    assert "not UTF-8" in text
    assert main(["shards", "show", str(shard), "a1"]) == 3
    assert "did you mean '../evil/a1'" in capsys.readouterr().err


def test_info_tells_damaged_shards_from_those_without_an_index(folder, capsys):
    (folder / "b.tar").write_bytes((folder / "b.tar").read_bytes()[:3000])
    (folder / "d.tar").write_bytes(b"")
    (folder / "e.tar").write_text("<!DOCTYPE html>")
    assert main(["shards", "info", str(folder)]) == 3
    told = capsys.readouterr()
    assert "3 shards cannot be used:" in told.out
    for problem in ("b.tar: truncated", "d.tar: the file is empty", "e.tar: not a tar"):
        assert problem in told.out
    assert "2 shards without an index" in told.out
    assert "3 of 5 shards damaged" in told.err


def test_show_finds_a_sample_beside_damaged_shards(folder, capsys):
    (folder / "a.tar").write_bytes(b"")
    assert main(["shards", "show", str(folder), "c1"]) == 0
    told = capsys.readouterr()
    assert "sample 2 of 3" in told.out
    assert "a.tar: the file is empty" in told.err
    assert main(["shards", "show", str(folder), "a1"]) == 3
    assert "1 of 3 shards cannot be looked into" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_show_says_where_it_cannot_extract(folder, capsys, place):
    (folder / "file").write_text("")
    assert main(["shards", "show", str(folder), "c1", "--extract", str(folder / place)]) == 3
    assert f"--extract {folder / place}: " in capsys.readouterr().err


def test_records_of_json_are_looked_up_by_their_line(tmp_path, capsys):
    assert main(["shards", "show", str(tmp_path / "talks.jsonl"), "talks.jsonl:3"]) == 3
    assert "sed -n" in capsys.readouterr().err
