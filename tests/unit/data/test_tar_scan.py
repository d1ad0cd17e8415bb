"""The fast walk over a tar gives what tarfile gives, and says of every damaged file what is wrong with it."""

import gzip
import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.unit.data.samples import jpeg, mp4, noise, png
from vlm_dist.data.index.facts import probe_image
from vlm_dist.data.index.image_header import HEAD_BYTES, plain_image_size
from vlm_dist.data.index.shard_index import INDEX_SUFFIX, read_index
from vlm_dist.data.index.tar_headers import TarReader
from vlm_dist.data.index.tar_scan import scan_tar
from vlm_dist.data.shards.writer import ShardWriter
from vlm_dist.errors import DataError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
names = st.text("abä/. 漢", min_size=1, max_size=20).map(lambda s: s.strip("/") or "x")
long_names = st.builds(lambda name, times: "/".join([name.replace("/", "_")] * times), names, st.integers(1, 30))


@st.composite
def tars(draw):
    """A tar as tarfile writes it, of files, directories and links."""
    stream = io.BytesIO()
    headers = draw(st.sampled_from([{}, {"comment": "made by a test"}, {"path": "everybody/has/this.name"}]))
    with tarfile.open(
        fileobj=stream, mode="w", format=FORMATS[draw(st.sampled_from(sorted(FORMATS)))], pax_headers=headers
    ) as archive:
        for _ in range(draw(st.integers(0, 8))):
            info = tarfile.TarInfo(draw(st.one_of(names, long_names)))
            info.type = draw(
                st.sampled_from([tarfile.REGTYPE] * 5 + [tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])
            )
            if info.type == tarfile.AREGTYPE:  # of a long name cut after a slash, tarfile makes a directory
                info.name = draw(names)
            info.linkname = draw(long_names) if info.issym() else ""
            info.mtime = draw(st.sampled_from([0, 1_700_000_000, 1_700_000_000.5]))
            info.uname = draw(st.sampled_from(["", "root", "jürgen"]))
            data = draw(st.binary(max_size=2000)) if info.isreg() else b""
            info.size = len(data)
            try:
                archive.addfile(info, io.BytesIO(data))
            except ValueError:  # too long a name for USTAR
                continue
    return Content(stream.getvalue())


class Content(bytes):
    """Bytes that a failing test does not print."""

    def __repr__(self):
        return f"<{len(self)} bytes>"


def walk(path):
    with TarReader(path) as reader:
        return [(m.name, m.is_regular, m.is_directory, m.offset, m.size) for m in reader.members()]


def walk_with_tarfile(path):
    with tarfile.open(path, "r:", encoding="utf-8") as archive:
        return [(m.name, m.isreg() and not m.issparse(), m.isdir(), m.offset_data, m.size) for m in archive]


@settings(deadline=None)
@given(data=tars())
def test_a_walk_gives_what_tarfile_gives(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("t") / "s.tar"
    path.write_bytes(data)
    try:
        expected = walk_with_tarfile(path)
    except tarfile.ReadError:  # nothing but a global header
        with pytest.raises(DataError):
            walk(path)
        return
    assert walk(path) == expected


@settings(deadline=None)
@given(data=tars(), flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4))
def test_no_damage_hangs_the_walk_or_passes_as_more_than_tarfile_finds(tmp_path_factory, data, flips):
    damaged = bytearray(data)
    for position, flip in flips:
        damaged[position % len(damaged)] ^= flip
    path = tmp_path_factory.mktemp("t") / "s.tar"
    path.write_bytes(damaged)
    try:
        found = walk(path)
    except DataError as error:
        assert "s.tar: " in str(error)
        return
    assert found == walk_with_tarfile(path)


def test_large_and_sparse_members(tmp_path):
    path = tmp_path / "s.tar"
    with path.open("wb") as stream:  # 9 GiB, but of a hole
        info = tarfile.TarInfo("a.bin")
        info.size = 9 * 2**30
        stream.write(info.tobuf(tarfile.GNU_FORMAT))
        stream.seek(info.size, 1)
        info = tarfile.TarInfo("b.txt")
        stream.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert walk(path) == [("a.bin", True, False, 512, 9 * 2**30), ("b.txt", True, False, 1024 + 9 * 2**30, 0)]


def sample_tar(path, tar_format=tarfile.PAX_FORMAT, key="s"):
    with tarfile.open(path, "w", format=tar_format) as archive:
        for i in range(3):
            for extension, data in (("jpg", jpeg(32 + i)), ("json", b'{"q": "x"}')):
                info = tarfile.TarInfo(f"{key}{i}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("tar_format", sorted(FORMATS))
def test_a_tar_cut_anywhere_is_called_truncated(tmp_path, tar_format):
    long = "ordner/" * 20 if tar_format != "ustar" else ""
    whole = sample_tar(tmp_path / "s.tar", FORMATS[tar_format], long + "k").read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for cut in range(0, end, 173):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"cut\.tar: .*truncated"):
            scan_tar(tmp_path / "cut.tar")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "the file is empty"),
        (lambda data: b"<!DOCTYPE html>\n<html>" + b"x" * 2000, "not a tar: it starts with '<!DOCTYPE html>.*web page"),
        (lambda data: b'{"error": "expired"}', "not a tar: .*error message"),
        (gzip.compress, r"compressed file \(gzip\).*decompress"),
        (lambda data: b"PK\x03\x04" + data, r"compressed file \(zip\)"),
        (lambda data: data[:3] + b"\xff" + data[4:], "damaged header at byte 0"),
        (lambda data: data.replace(b"s1.jpg", b"s1.jpf"), "damaged header at byte [1-9]"),
        (lambda data: data[:2048] + bytes(1024) + data[3072:], "zeros at byte|damaged header"),
        (lambda data: data + data, "zeros at byte .* joined by cat"),
        (lambda data: b"\xff" * len(data), "not a tar"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    data = sample_tar(tmp_path / "s.tar").read_bytes()
    (tmp_path / "bad.tar").write_bytes(damage(data))
    with pytest.raises(DataError, match=rf"bad\.tar: .*{message}|bad\.tar: {message}"):
        scan_tar(tmp_path / "bad.tar")


def test_a_hole_of_zeros_is_not_the_end(tmp_path):
    path = sample_tar(tmp_path / "s.tar")
    data = path.read_bytes()
    second = walk(path)[2][3] - 512
    path.write_bytes(data[:second] + bytes(len(data) - second))
    assert len(scan_tar(path)) == 1  # nobody can tell: it is as if it had been written so
    path.write_bytes(data[:second] + bytes(512) + data[second + 512 :])
    with pytest.raises(DataError, match=f"zeros at byte {second} end the archive"):
        scan_tar(path)


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("caf\xe9.txt"))
    with pytest.raises(DataError, match="not UTF-8"):
        scan_tar(tmp_path / "s.tar")


def test_written_and_scanned_indexes_agree_on_all_kinds_of_members(tmp_path):
    image = Image.fromarray(noise(300, 200))
    webp = io.BytesIO()
    image.save(webp, "WEBP", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "x" * 9000  # more than a scan reads at first
    with ShardWriter(tmp_path) as writer:
        writer.write(
            {
                "__key__": "langer/ordner/" * 10 + "k",
                "jpg": jpeg(400, 300, exif=exif),
                "a.jpg": jpeg(40, 30),
                "png": png(image),
                "webp": webp.getvalue(),
                "mp4": mp4(4),
                "json": {"q": "frage " * 2000},
                "txt": "",
                "bin": bytes(100_000),
            }
        )
    shard = tmp_path / "shard-000000.tar"
    written, scanned = read_index(shard.with_name(shard.name + INDEX_SUFFIX)), scan_tar(shard, checksums=True)
    assert scanned.digest == written.digest
    assert scanned.checksums.tolist() == written.checksums.tolist()
    assert scan_tar(shard).checksums is None
    assert int(scanned.facts["num_images"][0]) == 4
    assert int(scanned.facts["image_pixels"][0]) == 400 * 300 + 40 * 30 + 2 * 300 * 200


def pictures():
    image = Image.fromarray(noise(33, 21))
    for kind, options in [
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "comment": b"hello"}),
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("PNG", {}),
        ("PNG", {"dpi": (72, 72)}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}),
        ("GIF", {}),
    ]:
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        yield stream.getvalue()
    for mode in ("L", "CMYK"):
        stream = io.BytesIO()
        image.convert(mode).save(stream, "JPEG")
        yield stream.getvalue()


PICTURES = list(pictures())


def test_plain_pictures_need_no_pillow():
    plain = [plain_image_size(data[:HEAD_BYTES], len(data)) for data in PICTURES]
    assert plain.count((33, 21)) >= 8


@settings(deadline=None, max_examples=300)
@given(data=st.sampled_from(PICTURES), where=st.integers(0, 800), byte=st.integers(0, 255), cut=st.integers(1, 4000))
def test_the_quick_look_agrees_with_pillow(data, where, byte, cut):
    where %= len(data)
    for damaged in (data, data[:where] + bytes([byte]) + data[where + 1 :], data[:cut]):
        quick = plain_image_size(damaged[:HEAD_BYTES], len(damaged))
        assert quick is None or quick == probe_image(io.BytesIO(damaged))
