"""Shards that name the same thing in several ways."""

from types import SimpleNamespace

import pytest

from vlm_dist.data.shards.writer import ShardWriter
from vlm_dist.data.sources import open_source
from vlm_dist.errors import DataError


def write(directory, samples):
    with ShardWriter(directory, max_samples=2) as writer:
        for i, sample in enumerate(samples):
            writer.write({"__key__": f"s{i}", "json": {"question": "q"}, **sample})
    return directory


def open_tar(path, *, media=("image",), used=None, **settings):
    return open_source(SimpleNamespace(type="tar", path=str(path), **settings), None, media, used)


MIXED = [{"jpg": b"0"}, {"png": b"1"}, {"jpg": b"2"}, {"webp": b"3"}, {}]


@pytest.mark.parametrize("used", [None, ["image"]])
def test_the_only_picture_of_a_sample_is_its_image(tmp_path, used):
    source = open_tar(write(tmp_path, MIXED), used=used)
    assert "image" in source.columns
    assert [source.read(i).fields.get("image") for i in range(5)] == [b"0", b"1", b"2", b"3", None]
    if used:
        assert set(source.read(0).fields) == {"image"}


def test_alternatives_are_named_by_semicolons(tmp_path):
    write(tmp_path, MIXED)
    source = open_tar(tmp_path, media=["png;jpg"], used=["png;jpg", "question"])
    assert "png;jpg" in source.columns
    assert [source.read(i).fields.get("png;jpg") for i in range(4)] == [b"0", b"1", b"2", None]
    renamed = open_tar(tmp_path, columns={"picture": "jpg; png"})
    assert set(renamed.columns) == {"picture", "webp", "question", "image"}
    assert [renamed.read(i).fields.get("picture") for i in range(4)] == [b"0", b"1", b"2", None]
    with pytest.raises(DataError, match="'bmp;gif'"):
        open_tar(tmp_path, columns={"picture": "bmp;gif"})
    assert "bmp;gif" not in open_tar(tmp_path, media=["bmp;gif"]).columns


def test_a_sample_with_two_pictures_needs_a_name_that_chooses(tmp_path):
    source = open_tar(write(tmp_path, [{"jpg": b"photo", "png": b"mask"}, {"jpg": b"photo"}]))
    assert "image" not in source.columns
    both = open_tar(tmp_path, columns={"image": "jpg;png"})
    assert both.read(0).fields["image"] == b"photo"


@pytest.mark.parametrize(
    ("sample", "has_image"),
    [
        ({"left.jpg": b"1", "right.jpg": b"2"}, False),
        ({"jpg": b"1", "left.jpg": b"2"}, True),
        ({"jpg": b"1", "json": {"image": "a name"}}, None),
        ({"txt": "text alone"}, False),
    ],
)
def test_names_that_are_there_are_not_hidden(tmp_path, sample, has_image):
    source = open_tar(write(tmp_path, [sample]))
    if has_image is None:
        assert source.read(0).fields["image"] == "a name"
    else:
        assert ("image" in source.columns) is has_image
        assert source.read(0).fields.get("image") == (b"1" if has_image else None)


def test_videos_and_images_of_one_set(tmp_path):
    source = open_tar(write(tmp_path, [{"mp4": b"v"}, {"jpg": b"i"}, {"jpg": b"i", "webm": b"w"}]))
    assert [source.read(i).fields.get("video") for i in range(3)] == [b"v", None, b"w"]
    assert [source.read(i).fields.get("image") for i in range(3)] == [None, b"i", b"i"]


NUMBERED = [
    {"jpg": b"0", "left.png": b"l"},
    {"image_000.jpg": b"1", "image_001.png": b"2", "left_000.jpg": b"l0", "left_001.jpg": b"l1"},
    {"image_002.jpg": b"c", "image_010.jpg": b"d", "image_000.png": b"a", "image_001.jpg": b"b"},
    {},
]


@pytest.mark.parametrize("used", [None, ["image", "left"]])
def test_several_pictures_of_a_sample_are_a_list(tmp_path, used):
    source = open_tar(write(tmp_path, NUMBERED), media=("image", "left"), used=used)
    rows = [source.read(i).fields for i in range(4)]
    assert [row.get("image") for row in rows] == [b"0", [b"1", b"2"], [b"a", b"b", b"c", b"d"], None]
    assert [row.get("left") for row in rows] == [b"l", [b"l0", b"l1"], None, None]


def test_a_list_beside_an_ambiguous_picture_is_no_column(tmp_path):
    source = open_tar(write(tmp_path, [{"jpg": b"0", "png": b"1"}, {"image_000.jpg": b"1", "image_001.jpg": b"2"}]))
    assert "image" not in source.columns
