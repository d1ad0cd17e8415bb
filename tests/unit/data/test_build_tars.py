"""Existing tars become other tars: other sizes, legal and unique keys, without what nobody wants."""

import io
import json
import tarfile

import pytest

from tests.unit.data.building import build, contents, keys, picture, rows
from vlm_dist.errors import DataError


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(key, number, **more):
    text = json.dumps({"question": f"q{number}", "answer": "a"}).encode()
    return [(f"{key}.jpg", picture(number)), (f"{key}.json", text), *((f"{key}.{n}", v) for n, v in more.items())]


def write_two(tmp_path):
    """Both have keys from 0 on; one sample in each."""
    for tar in range(2):
        members = [member for n in range(5) for member in sample(f"{n:04d}", 10 * tar + n, txt=b"note")]
        write_tar(tmp_path / "old" / f"{tar}.tar", members)
    return tmp_path / "old"


def test_other_sizes_and_unique_keys(tmp_path):
    build(write_two(tmp_path), tmp_path / "out", type="tar", max_samples=4)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3
    assert keys(tmp_path / "out") == [f"{n:04d}" for n in range(5)] + [f"{n:04d}_2" for n in range(5)]
    assert [row["question"] for row in rows(tmp_path / "out")] == [f"q{10 * t + n}" for t in range(2) for n in range(5)]
    assert rows(tmp_path / "out")[7]["image"] == picture(12)
    build(tmp_path / "out", tmp_path / "again", type="tar", max_samples=4, workers=1)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_members_are_renamed_and_dropped(tmp_path):
    build(
        write_two(tmp_path),
        tmp_path / "out",
        type="tar",
        columns={"caption": "txt"},
        drop=("json",),
        shuffle=0,
        limit=6,
    )
    made = rows(tmp_path / "out")
    assert len(made) == 6
    assert set(made[0]) == {"jpg", "image", "caption"}
    with pytest.raises(DataError, match="--drop: there is no member 'png'; there are: jpg, json, txt"):
        build(tmp_path / "old", tmp_path / "out2", type="tar", drop=("png",))


def test_dots_in_keys_and_other_things(tmp_path):
    members = [("./", b""), ("README", b"x"), *sample("img_1.5x", 1), *sample("img_1.7x", 2), *sample("v1.0/a", 3)]
    write_tar(tmp_path / "a.tar", [member for member in members if member[0] != "./"])
    summary = build(tmp_path / "a.tar", tmp_path / "out", type="tar")
    assert keys(tmp_path / "out") == ["img_1_5x", "img_1_7x", "v1_0/a"]
    assert [row["question"] for row in rows(tmp_path / "out")] == ["q1", "q2", "q3"]
    assert any("1 tar members are no part of a sample" in notice for notice in summary.notices)
    assert any("2 keys had a dot" in notice for notice in summary.notices)


def test_the_same_key_twice_in_a_tar(tmp_path):
    write_tar(tmp_path / "a.tar", [*sample("a", 1), *sample("a", 2), *sample("b", 3), *sample("a", 4)])
    build(tmp_path / "a.tar", tmp_path / "out", type="tar")
    assert keys(tmp_path / "out") == ["a", "a_2", "b", "a_3"]
    assert [row["question"] for row in rows(tmp_path / "out")] == ["q1", "q2", "q3", "q4"]


def test_members_that_do_not_follow_each_other_are_one_sample(tmp_path):
    """All pictures first, then all texts; a key that comes again in whole is still another sample."""
    samples = [sample(key, n) for n, key in enumerate("abc")]
    members = [*(pair[0] for pair in samples), *(pair[1] for pair in samples), *sample("b", 7)]
    for skip_bad in (False, True):
        summary = build(write_tar(tmp_path / "a.tar", members), tmp_path / f"{skip_bad}", type="tar", skip_bad=skip_bad)
        assert keys(tmp_path / f"{skip_bad}") == ["a", "b", "c", "b_2"]
        made = rows(tmp_path / f"{skip_bad}")
        assert [(row["question"], row["image"]) for row in made] == [(f"q{n}", picture(n)) for n in (0, 1, 2, 7)]
        assert not summary.skipped
    assert any("3 samples did not follow each other" in notice for notice in summary.notices)


def test_a_build_that_writes_nothing_leaves_no_directory(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty"):
        build(tmp_path / "old", tmp_path / "new" / "out", type="tar")
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="the file is empty"):
        build(tmp_path / "old", tmp_path / "mine", type="tar")
    assert (tmp_path / "mine").is_dir()


def test_damage(tmp_path):
    members = [*sample("a", 1), *sample("b", 2), ("c.jpg", b"<html>"), ("c.json", b"{}"), *sample("d", 4)]
    path = write_tar(tmp_path / "a.tar", [*members, ("e.jpg", picture(5)), ("e.json", b"{"), ("f.jpg", picture(6))])
    summary = build(path, tmp_path / "a", type="tar", skip_bad=True)
    assert keys(tmp_path / "a") == ["a", "b", "d"]  # c: no picture; e: no JSON; f: lacks a member
    assert summary.skipped == {"bad_media": 1, "malformed": 1, "members": 1}
    path.write_bytes(path.read_bytes()[:6657])
    with pytest.raises(DataError, match="truncated inside"):
        build(path, tmp_path / "b", type="tar")
    summary = build(path, tmp_path / "b", type="tar", skip_bad=True)
    assert keys(tmp_path / "b") == ["a", "b"]
    assert "used up to the damage" in summary.notices[0]


def test_options_for_rows_are_refused(tmp_path):
    with pytest.raises(DataError, match="--key-column is not for --from tar"):
        build(write_two(tmp_path), tmp_path / "out", type="tar", key_column="id")
