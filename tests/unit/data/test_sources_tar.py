"""Tar sources: any row, from any process, and clear words when the data is not there."""

import io
import json
import os
import pickle
import subprocess
import sys
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vlm_dist.cli.main import main
from vlm_dist.data.lengths.estimate import estimate_num_tokens
from vlm_dist.data.shards.writer import ShardWriter
from vlm_dist.data.sources import open_source
from vlm_dist.data.storage.find import expand_braces, find_files
from vlm_dist.errors import DataError, SkipSample


def png(size):
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path / "data", "train", max_samples=4) as writer:
        for i in range(10):
            document = {"question": f"q{i}", "answer": "a" * 10 * i}
            writer.write({"__key__": f"s{i}", "png": png((28 + i, 28)), "json": document, "txt": "노트"})
    return tmp_path / "data"


def tar(path, **settings):
    return SimpleNamespace(type="tar", path=str(path), **settings)


@pytest.mark.parametrize("pattern", ["", "*.tar", "train-{000000..000002}.tar", "train-{000000,000001,000002}.tar"])
def test_shards_are_found(shards, pattern):
    source = open_source(tar(shards / pattern))
    assert len(source) == 10
    assert source.shard_sizes == [4, 4, 2]
    assert source.columns == ("png", "txt", "answer", "question", "image")
    assert source.name == "data"
    assert source.manifest_hash == open_source(tar(shards)).manifest_hash


def test_a_shard_that_is_gone_is_told_where_the_directory_is_meant(shards):
    (shards / "train-000001.tar").rename(shards / "train-000001.tar.away")
    with pytest.raises(DataError, match=r"1 shard of its manifest\.json is not there, first train-000001\.tar;"):
        open_source(tar(shards))
    assert len(open_source(tar(shards / "*.tar"))) == 6  # what is there
    assert main(["shards", "index", str(shards)]) == 0  # as the message says
    assert len(open_source(tar(shards))) == 6


def test_rows_are_read(shards):
    sample = open_source(tar(shards)).read(9)
    picture = png((37, 28))
    assert sample.fields == {"png": picture, "image": picture, "txt": "노트", "question": "q9", "answer": "a" * 90}
    assert str(sample.origin) == "data/train-000002.tar:s9"
    with pytest.raises(IndexError):
        open_source(tar(shards)).read(10)


def test_members_can_be_had_as_they_are_stored(shards):
    source = open_source(tar(shards, columns={"query": "question"}))
    assert json.loads(source.read_members(9)["json"]) == {"question": "q9", "answer": "a" * 90}
    source.keep_columns(["image"])
    assert source.read_members(9) == {"png": png((37, 28))}
    shard = shards / "train-000002.tar"
    shard.write_bytes(shard.read_bytes().replace(b"s9.png", b"s8.png"))
    with pytest.raises(DataError, match=r"train-000002\.tar.*not at the place"):
        source.read_members(9)


def test_columns_are_renamed(shards):
    source = open_source(tar(shards, columns={"image": "png", "query": "question"}, name="digits"))
    assert set(source.columns) == {"image", "query", "answer", "txt"}
    assert set(source.read(0).fields) == set(source.columns)
    assert source.origin(0).source == "digits"
    with pytest.raises(DataError, match=r"'picture'.*it has: png, txt, answer, question"):
        open_source(tar(shards, columns={"image": "picture"}))


def test_only_the_first_samples(shards):
    source = open_source(tar(shards, max_samples=5))
    assert len(source) == 5
    assert source.shard_sizes == [4, 1, 0]
    assert source.manifest_hash != open_source(tar(shards)).manifest_hash


def test_lengths_follow_text_and_pixels(shards):
    lengths = estimate_num_tokens(open_source(tar(shards)).facts(np.array([9, 0, 5, 0])))
    assert lengths.dtype == np.int64
    assert lengths[0] > lengths[2] > lengths[1] == lengths[3]


def test_the_manifest_hash_does_not_depend_on_the_place(shards, tmp_path):
    before = open_source(tar(shards)).manifest_hash
    shards.rename(tmp_path / "moved")
    assert open_source(tar(tmp_path / "moved")).manifest_hash == before
    for sidecar in (tmp_path / "moved").glob("*.arrow"):
        sidecar.unlink()
    (tmp_path / "moved" / "manifest.json").unlink()
    assert open_source(tar(tmp_path / "moved")).manifest_hash == before


def read_in_child(source, row, queue):
    queue.put((len(source.read(row).fields["png"]), source.origin(row).key))


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_source_works_in_other_processes(shards, method):
    source = open_source(tar(shards))
    source.read(0)  # opens files in the parent
    context = get_context(method)
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(source, 7, queue))
    child.start()
    assert queue.get(timeout=60) == (len(source.read(7).fields["png"]), "s7")
    child.join(60)


def test_a_pickled_source_is_small_and_whole(shards):
    source = open_source(tar(shards))
    source.read(0)
    data = pickle.dumps(source)
    assert len(data) < 4000
    assert pickle.loads(data).read(3).fields == source.read(3).fields


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_dist.data.storage.open_files._MAX_OPEN_FILES", 2)
    with ShardWriter(tmp_path, max_samples=1) as writer:
        for i in range(9):
            writer.write({"__key__": f"{i}", "txt": f"{i}"})
    source = open_source(tar(tmp_path))
    assert [source.read(i).fields["txt"] for i in [*range(9), 0]] == [*"012345678", "0"]
    assert len(source._storage._files._open) == 2


def test_damaged_text_is_skipped_and_names_the_sample(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write({"__key__": "a", "json": b'{"question": ', "txt": "fine"})
        writer.write({"__key__": "b", "json": b'{"question": "x"}', "txt": b"\xff\xfe"})
    source = open_source(tar(tmp_path))
    for row, key in enumerate("ab"):
        with pytest.raises(SkipSample, match=f"shard-000000.tar:{key}") as skipped:
            source.read(row)
        assert skipped.value.null_class == "bad_sample"


def test_a_shard_that_changes_under_the_run_is_an_error_not_other_data(shards):
    source = open_source(tar(shards))
    shard = shards / "train-000000.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:512] + data[1024:] + bytes(512))
    with pytest.raises(DataError, match=r"train-000000\.tar.*not at the place"):
        source.read(1)
    shard.unlink()
    again = open_source(tar(shards / "*.tar"))
    (shards / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar: cannot open the shard"):
        again.read(0)


def test_a_truncated_shard_is_an_error(shards):
    source = open_source(tar(shards))
    shard = shards / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(DataError, match="truncated"):
        source.read(3)
    with pytest.raises(DataError, match=r"train-000000\.tar.*truncated"):
        open_source(tar(shards))


def test_a_storage_that_fails_for_a_moment_is_asked_again(shards, monkeypatch):
    source = open_source(tar(shards))
    source.read(0)
    failures = [OSError(5, "Input/output error")] * 2
    read = os.pread

    def flaky(*arguments):
        if failures:
            raise failures.pop()
        return read(*arguments)

    monkeypatch.setattr("vlm_dist.data.storage.open_files._BACKOFF_SECONDS", 0.0)
    monkeypatch.setattr(os, "pread", flaky)
    assert source.read(0).fields["question"] == "q0"
    failures = [OSError(5, "Input/output error")] * 9
    with pytest.raises(DataError, match="Input/output error"):
        source.read(0)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{root}/nothing/*.tar", r"nothing/\*\.tar.*looked in .*nothing, which does not exist"),
        ("{root}/data/*.tgz", r"no \.tar\.gz .*files found.*looked in .*data\)"),
        ("{root}/data/*.shard", r"no \.tar files found.*looked in .*data\)"),
        ("{root}/data/train-{{000000..000004}}.tar", r"2 of the files .* first .*train-000003"),
    ],
)
def test_missing_shards_are_named(shards, path, message):
    with pytest.raises(DataError, match=message):
        open_source(tar(path.format(root=shards.parent)))


def test_unknown_type():
    with pytest.raises(DataError, match="expected tar, hf or jsonl"):
        open_source(SimpleNamespace(type="zip", path="x"))


def test_shards_that_a_directory_does_not_stand_for_are_named(tmp_path, caplog):
    """A directory means its *.tar; what looks like a shard and is none of them is told of once, with the way out."""
    for name in ("a.tar", "b.TAR", "c.tar.gz", "d.tgz", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in find_files("S", str(tmp_path), (".tar",))] == ["a.tar"]
    (record,) = caplog.records
    assert "3 files are not read (b.TAR, c.tar.gz, d.tgz)" in record.message
    assert f"path: '{tmp_path}/*.tar.gz'" in record.message
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DataError, match=r"no \.tar files found.*c\.tar\.gz.*source of their own"):
        find_files("S", str(tmp_path), (".tar",))


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{a,b}{1..2}", ["a1", "a2", "b1", "b2"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{name}.tar", ["{name}.tar"]),
    ],
)
def test_braces(pattern, expanded):
    assert expand_braces(pattern) == expanded


def test_reading_tars_imports_no_torch():
    code = "import sys, vlm_dist.data.sources.tar, vlm_dist.data.plan.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
