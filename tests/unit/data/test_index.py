"""Existing tars are indexed once, and damaged or ambiguous ones are refused with a reason."""

import io
import struct
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_dist.data.index.facts import FACTS_DTYPE, media_kind, probe_image, probe_video
from vlm_dist.data.index.mp4_header import read_mp4_header
from vlm_dist.data.index.open_index import load_or_scan
from vlm_dist.data.index.shard_index import INDEX_SUFFIX, read_index, read_metadata, sidecar_paths, write_index
from vlm_dist.data.index.tar_scan import scan_tar
from vlm_dist.data.lengths.estimate import estimate_num_tokens
from vlm_dist.errors import DataError


def write_tar(path, members, tar_format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


PAIR = [("a.txt", b"one"), ("a.json", b'{"q": "x"}'), ("b.txt", b"two"), ("b.json", b'{"q": "y"}')]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@settings(deadline=None)
@given(samples=st.lists(st.lists(st.binary(max_size=1500), min_size=1, max_size=3), min_size=1, max_size=5))
def test_offsets_lead_to_the_data(tmp_path_factory, tar_format, samples):
    path = tmp_path_factory.mktemp("t") / "s.tar"
    members = [(f"dir/k{i}.m{j}", data) for i, sample in enumerate(samples) for j, data in enumerate(sample)]
    index = scan_tar(write_tar(path, members, tar_format))
    content = path.read_bytes()
    for i, sample in enumerate(samples):
        spans = index.members_of(i)
        assert index.key(i) == f"dir/k{i}"
        assert [content[o : o + n] for o, n in (spans[f"m{j}"] for j in range(len(sample)))] == sample


def test_an_index_survives_writing_and_reading(tmp_path):
    index = scan_tar(write_tar(tmp_path / "s.tar", PAIR))
    write_index(index, tmp_path / "x.arrow")
    again = read_index(tmp_path / "x.arrow")
    assert again.digest == index.digest
    assert again.members_of(1) == index.members_of(1)
    assert np.array_equal(again.facts, index.facts)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_a_tar_without_index_gets_one_beside_it(tmp_path):
    shard = write_tar(tmp_path / "s.tar", PAIR)
    assert len(load_or_scan(shard)) == 2
    assert (tmp_path / ("s.tar" + INDEX_SUFFIX)).exists()


def test_an_index_goes_to_index_dir_where_the_data_is_read_only(tmp_path, monkeypatch):
    shard = write_tar(tmp_path / "s.tar", PAIR)
    beside, kept = sidecar_paths(shard, tmp_path / "index")
    beside.mkdir()  # nothing can be written there, even by root
    first = load_or_scan(shard, tmp_path / "index")
    assert kept.exists()
    monkeypatch.setattr("vlm_dist.data.index.open_index.scan_tar", None)  # would fail if it were indexed again
    assert load_or_scan(shard, tmp_path / "index").digest == first.digest


def test_a_replaced_shard_is_indexed_again(tmp_path):
    shard = write_tar(tmp_path / "s.tar", PAIR)
    load_or_scan(shard)
    write_tar(shard, PAIR + [(f"c{i}.{name}", b"{}") for i in range(20) for name in ("txt", "json")])
    assert len(load_or_scan(shard)) == 22


def test_a_damaged_sidecar_is_made_again(tmp_path):
    shard = write_tar(tmp_path / "s.tar", PAIR)
    load_or_scan(shard)
    sidecar = tmp_path / ("s.tar" + INDEX_SUFFIX)
    good = sidecar.read_bytes()
    sidecar.write_bytes(good[: len(good) // 2])
    assert len(load_or_scan(shard)) == 2
    assert sidecar.read_bytes() == good


def _flips(good, step):
    """Copies of a file with one byte changed."""
    for place in range(0, len(good), step):
        for mask in (0x01, 0x80, 0xFF):
            yield good[:place] + bytes([good[place] ^ mask]) + good[place + 1 :]


def test_a_damaged_index_is_none_or_as_it_was(tmp_path):
    """Whatever byte is changed and wherever the file is cut: no traceback, and no other offsets, facts or checksums."""
    path = tmp_path / "x.arrow"
    index = scan_tar(write_tar(tmp_path / "s.tar", PAIR), checksums=True)
    write_index(index, path)
    good, said = path.read_bytes(), read_metadata(path)
    for damaged in [*(good[:cut] for cut in range(0, len(good), 7)), *_flips(good, 3)]:
        path.write_bytes(damaged)
        read, words = read_index(path), read_metadata(path)
        assert words is None or all(words[name] == value for name, value in said.items() if name != "seal")
        if read is not None:
            assert (read.digest, read.num_bytes, read.stamp) == (index.digest, index.num_bytes, index.stamp)
            assert np.array_equal(read.checksums, index.checksums)


@pytest.mark.parametrize("change", ["no columns", "other types", "offsets as text", "no digest", "another list"])
def test_an_index_of_another_shape_is_made_again(tmp_path, change, caplog):
    shard = write_tar(tmp_path / "s.tar", PAIR)
    before = load_or_scan(shard)
    sidecar = tmp_path / ("s.tar" + INDEX_SUFFIX)
    table = pa.ipc.open_file(sidecar.read_bytes()).read_all()
    if change == "no columns":
        table = table.drop_columns(["size:json"])
    elif change == "other types":
        table = table.set_column(table.column_names.index("text_bytes"), "text_bytes", pa.array([1.5, None]))
    elif change == "offsets as text":
        table = table.set_column(table.column_names.index("offset:txt"), "offset:txt", pa.array(["x", "y"]))
    else:
        metadata = {k: v for k, v in table.schema.metadata.items() if k not in (b"seal", b"digest")}
        table = table.replace_schema_metadata(metadata if change == "no digest" else {**metadata, b"members": b"{"})
    with pa.ipc.new_file(sidecar, table.schema) as writer:
        writer.write_table(table)
    assert load_or_scan(shard).digest == before.digest
    assert "ignoring the damaged index" in caplog.text
    assert read_index(sidecar) is not None


def test_offsets_that_are_not_those_of_the_digest_are_not_used(tmp_path):
    """As when the file was damaged where no parser notices it."""
    shard = write_tar(tmp_path / "s.tar", PAIR)
    before = load_or_scan(shard)
    sidecar = tmp_path / ("s.tar" + INDEX_SUFFIX)
    table = pa.ipc.open_file(sidecar.read_bytes()).read_all()
    place = table.column_names.index("offset:txt")
    table = table.set_column(place, "offset:txt", pa.array([o + 1 for o in table.column(place).to_pylist()]))
    with pa.ipc.new_file(sidecar, table.schema) as writer:
        writer.write_table(table)
    assert load_or_scan(shard, expected=before.digest).members_of(1) == before.members_of(1)


def test_an_index_without_a_seal_is_trusted_as_far_as_its_rows_are(tmp_path):
    """As earlier versions wrote it."""
    path = tmp_path / "x.arrow"
    index = scan_tar(write_tar(tmp_path / "s.tar", PAIR), checksums=True)
    write_index(index, path)
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    metadata = {k: v for k, v in table.schema.metadata.items() if k not in (b"seal", b"checksums")}
    for number, is_read in ((b"2", True), (b"3", False)):
        changed = table.replace_schema_metadata({**metadata, b"num_samples": number})
        with pa.ipc.new_file(path, changed.schema) as writer:
            writer.write_table(changed)
        assert (read_index(path) is not None, read_metadata(path) is not None) == (is_read, is_read)


def test_every_cut_of_a_tar_is_noticed(tmp_path):
    whole = write_tar(tmp_path / "s.tar", PAIR).read_bytes()
    end = 4 * 1024  # four members of a header and a block each
    for cut in [*range(1, end, 256), end, end + 100]:
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"cut\.tar.*truncated"):
            scan_tar(tmp_path / "cut.tar")


def test_damage_between_members_is_not_taken_for_the_end(tmp_path):
    data = bytearray(write_tar(tmp_path / "s.tar", PAIR).read_bytes())
    data[1024:1124] = b"\xff" * 100
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(DataError, match="damaged header at byte 1024"):
        scan_tar(tmp_path / "s.tar")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("img_1.5x.jpg", b""), ("img_1.5x.json", b"{}"), ("img_1.7x.jpg", b"")], "must not contain a dot"),
        ([("a.v1.jpg", b""), ("a.v1.json", b"{}")], "must not contain a dot"),
        ([("a.txt", b"1"), ("b.txt", b"2"), ("a.txt", b"3")], "'a' occurs twice"),
        ([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.json", b"{}"), ("b.json", b"{}")], "'a' occurs twice"),
        ([("a.txt", b"1"), ("a.TXT", b"2")], "two 'txt' members"),
        ([*PAIR, ("c.txt", b"alone")], "'c' has no json member"),
        ([("LICENSE", b"text")], "no samples"),
        ([], "no samples"),
    ],
)
def test_ambiguous_tars_are_refused(tmp_path, members, message):
    with pytest.raises(DataError, match=message):
        scan_tar(write_tar(tmp_path / "s.tar", members))


def test_several_images_of_a_key_are_members_of_their_own(tmp_path):
    members = [("a.left.jpg", b"1"), ("a.right.jpg", b"22"), ("a.json", b"{}")]
    assert set(scan_tar(write_tar(tmp_path / "s.tar", members)).members_of(0)) == {"left.jpg", "right.jpg", "json"}


def test_a_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(DataError, match="decompress"):
        scan_tar(tmp_path / "s.tar")


def test_unreadable_media_are_indexed_all_the_same(tmp_path):
    """The sample becomes a null slot when it is decoded; the shard is sound."""
    index = scan_tar(write_tar(tmp_path / "s.tar", [("a.jpg", b"no image"), ("a.mp4", b"no video"), ("a.json", b"{")]))
    assert index.facts["num_images"][0] == 1
    assert index.facts["image_pixels"][0] == 0
    assert estimate_num_tokens(index.facts)[0] > 200


def test_headers_of_damaged_media_are_unknown():
    assert probe_image(b"\xff\xd8\xff\xe0 nonsense") is None
    assert probe_video(b"\0\0\0\x20ftypisom nonsense") is None


def clip(num_frames, width=64, height=48, container_format="mp4"):
    av = pytest.importorskip("av")
    stream = io.BytesIO()
    with av.open(stream, "w", format=container_format) as container:
        video = container.add_stream("mpeg4", rate=8)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        for i in range(num_frames):
            picture = np.full((height, width, 3), 10 * i % 256, dtype=np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
    return stream.getvalue()


@pytest.mark.parametrize("container_format", ["mp4", "mov", "avi", "matroska"])
def test_a_video_is_measured_by_its_header(tmp_path, container_format):
    data = clip(20, container_format=container_format)
    facts = scan_tar(write_tar(tmp_path / "s.tar", [("a.mp4", data), ("a.json", b"{}")])).facts[0]
    assert (facts["video_frames"], facts["video_width"], facts["video_height"]) == (20, 64, 48)
    assert facts["video_seconds"] == pytest.approx(2.5, abs=0.13)
    (tmp_path / "a.mp4").write_bytes(data)
    assert probe_video(tmp_path / "a.mp4")[0] == 20


def test_an_mp4_needs_no_decoder(monkeypatch):
    monkeypatch.setattr("vlm_dist.data.index.facts._probe_with_library", None)
    assert probe_video(clip(7)) == (7, pytest.approx(0.875), 64, 48)


def test_a_cut_video_is_unknown_and_does_not_kill_the_process():
    data = clip(20)
    assert all(probe_video(data[:cut]) is None for cut in (0, 10, len(data) // 2))


@pytest.fixture(scope="module")
def short_clip():
    return clip(3)


@settings(deadline=None)
@given(noise=st.binary(max_size=300), position=st.integers(0, 4000), byte=st.integers(0, 255))
def test_no_damage_crashes_the_header_reader(short_clip, noise, position, byte):
    position %= len(short_clip)
    changed = short_clip[:position] + bytes([byte]) + short_clip[position + 1 :]
    for damaged in (changed, short_clip[:position], noise):
        header = read_mp4_header(io.BytesIO(damaged))
        assert header is None or header.num_frames > 0


@given(st.integers(10, 10**6), st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 50))
def test_longer_samples_are_predicted_longer(text, width, height, more):
    facts = np.zeros(3, dtype=FACTS_DTYPE)
    facts["text_bytes"] = [text, text + 4 * more, text]
    facts["num_images"] = 1
    facts["image_pixels"] = [width * height, width * height, (width + 28 * more) * (height + 28 * more)]
    short, wordy, large = estimate_num_tokens(facts).tolist()
    assert short < wordy
    assert short <= large


def test_media_are_told_by_their_ending():
    assert media_kind("https://host/a.JPG?size=3") == "image"
    assert media_kind("clips/7.webm") == "video"
    assert media_kind("a sentence. With a dot") is None


def test_a_header_that_nobody_expects_is_of_unknown_size():
    stream = io.BytesIO()
    Image.new("RGB", (8, 6)).save(stream, "PNG")
    png = stream.getvalue()
    chunk = b"eXIf" + b"MM\x00\x2a"  # ends in the middle of its header
    odd = png[:33] + struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]
    assert probe_image(odd) in (None, (8, 6))
    assert probe_video(b"\x00\x00\x00\x10ftypisom\x00\x00\x00\x00" + _box(b"moov", _empty_track())) is None


def _box(kind, body):
    return struct.pack(">I4s", 8 + len(body), kind) + body


def _empty_track():
    table = _box(b"stbl", _box(b"stsz", struct.pack(">III", 0, 1, 1)))
    media = _box(b"mdhd", b"") + _box(b"hdlr", bytes(8) + b"vide") + _box(b"minf", table)
    return _box(b"trak", _box(b"tkhd", b"") + _box(b"mdia", media))
