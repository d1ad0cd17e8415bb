"""Shards are what webdataset reads, byte for byte the same each time, and never half written."""

import io
import json
import tarfile

import pytest
import webdataset
from PIL import Image

from vlm_dist.data.index.manifest import read_manifest
from vlm_dist.data.index.shard_index import INDEX_SUFFIX, read_index
from vlm_dist.data.index.tar_scan import scan_tar
from vlm_dist.data.shards.writer import ShardWriter
from vlm_dist.errors import DataError


def jpeg(width=32, height=16, orientation=None):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (width % 256, 7, 9)).save(stream, "JPEG", exif=exif)
    return stream.getvalue()


def write_samples(directory, num_samples=7, prefix="train", **options):
    with ShardWriter(directory, prefix, **options) as writer:
        for i in range(num_samples):
            document = {"question": f"Was ist {i}? 무엇", "answer": "ä" * i}
            writer.write({"__key__": f"s{i:04d}", "jpg": jpeg(32 + i), "json": document, "txt": f"note {i}"})
    return directory


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_the_same_samples_give_the_same_bytes(tmp_path):
    a, b = (contents(write_samples(tmp_path / name, max_samples=3)) for name in "ab")
    tars = [name for name in a if name.endswith(".tar")]
    assert tars == [f"train-{i:06d}.tar" for i in range(3)]
    assert [a[name] for name in tars] == [b[name] for name in tars]
    # indexes and manifest also hold the tars' times
    assert read_manifest(tmp_path / "a").hash == read_manifest(tmp_path / "b").hash


def test_webdataset_reads_what_was_written(tmp_path):
    write_samples(tmp_path, max_samples=3)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [f"s{i:04d}" for i in range(7)]
    assert json.loads(samples[3]["json"]) == {"question": "Was ist 3? 무엇", "answer": "äää"}
    assert samples[3]["jpg"] == jpeg(35)
    assert samples[3]["txt"] == b"note 3"


@pytest.mark.parametrize("key", ["short", "x" * 150, "ordner/übung"])
def test_recorded_offsets_are_those_that_tarfile_sees(tmp_path, key):
    with ShardWriter(tmp_path, "s") as writer:
        writer.write({"__key__": key, "jpg": jpeg(), "json": {"a": 1}})
        writer.write({"__key__": key + "2", "jpg": b"x" * 512, "json": {"a": 2}})
    shard = tmp_path / "s-000000.tar"
    index = read_index(shard.with_name(shard.name + INDEX_SUFFIX))
    with tarfile.open(shard) as archive:
        seen = {member.name: (member.offset_data, member.size) for member in archive}
    recorded = {
        f"{index.key(row)}.{name}": span for row in range(len(index)) for name, span in index.members_of(row).items()
    }
    assert recorded == seen


def test_a_scan_finds_the_index_that_was_written(tmp_path):
    write_samples(tmp_path, max_samples=100)
    shard = tmp_path / "train-000000.tar"
    written = read_index(shard.with_name(shard.name + INDEX_SUFFIX))
    scanned = scan_tar(shard)
    assert scanned.digest == written.digest
    assert written.facts["image_width"].tolist() == [32 + i for i in range(7)]
    assert written.json_fields == ("answer", "question")


def test_a_photograph_on_its_side_is_measured_upright(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write({"__key__": "a", "jpg": jpeg(64, 16, orientation=6), "json": {}})
    facts = scan_tar(tmp_path / "shard-000000.tar").facts
    assert (facts["image_width"][0], facts["image_height"][0]) == (16, 64)


def test_shards_are_closed_by_size(tmp_path):
    with ShardWriter(tmp_path, max_shard_bytes=4096) as writer:
        for i in range(4):
            writer.write({"__key__": f"{i}", "bin": bytes(3000)})
    assert [shard.num_samples for shard in read_manifest(tmp_path).shards] == [2, 2]


def test_an_interrupted_writer_leaves_no_half_shard(tmp_path):
    with pytest.raises(RuntimeError, match="boom"), ShardWriter(tmp_path, max_samples=2) as writer:
        for i in range(3):
            writer.write({"__key__": f"{i}", "txt": "x"})
        raise RuntimeError("boom")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-000000.tar", "shard-000000.tar.index.arrow"]


def test_existing_shards_are_not_replaced_by_accident(tmp_path):
    write_samples(tmp_path, 7, max_samples=2)
    with pytest.raises(DataError, match=r"already.*--overwrite"):
        ShardWriter(tmp_path, "train")
    write_samples(tmp_path, 3, max_samples=2, overwrite=True)
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["train-000000.tar", "train-000001.tar"]
    assert read_manifest(tmp_path).num_samples == 3


def test_the_manifest_describes_all_prefixes(tmp_path):
    write_samples(tmp_path, 4, prefix="train")
    write_samples(tmp_path, 2, prefix="eval")
    manifest = read_manifest(tmp_path)
    assert {shard.name: shard.num_samples for shard in manifest.shards} == {
        "eval-000000.tar": 2,
        "train-000000.tar": 4,
    }


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"txt": "no key"}], "__key__"),
        ([{"__key__": "img_1.5x", "txt": "x"}], "without dots"),
        ([{"__key__": "a", "txt": "x"}, {"__key__": "a", "txt": "y"}], "written before"),
        ([{"__key__": "a", "txt": "x", "json": {}}, {"__key__": "b", "txt": "y"}], "no json member"),
        ([{"__key__": "a", "json": {"x": object()}}], "cannot be written as JSON"),
        ([{"__key__": "a", "json": "{not json"}], "cannot be written as JSON"),
        ([{"__key__": "a", "jpg": object()}], "must be bytes or str"),
        ([{"__key__": "a"}], "no members"),
    ],
)
def test_samples_that_break_the_convention_are_refused(tmp_path, samples, message):
    with pytest.raises(DataError, match=message), ShardWriter(tmp_path) as writer:
        for sample in samples:
            writer.write(sample)


def test_a_text_only_sample_may_stand_beside_images(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write({"__key__": "a", "jpg": jpeg(), "json": {"q": "x"}})
        writer.write({"__key__": "b", "json": {"q": "y"}})
    assert len(scan_tar(tmp_path / "shard-000000.tar")) == 2
