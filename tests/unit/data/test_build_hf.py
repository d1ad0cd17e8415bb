"""Hugging Face datasets of every form become the same shards; media stay encoded as they were."""

import datetime
import io
import json

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from tests.unit.data.building import build, contents, opened, picture, rows, write_pictures
from tests.unit.data.samples import mp4
from vlm_dist.data.shards.build import BuildSettings, build_shards
from vlm_dist.data.shards.build.hf_records import RowRecords
from vlm_dist.data.shards.build.records import Held
from vlm_dist.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def encoded(level):
    return {"bytes": picture(level), "path": None}


def table(count=6):
    rows = {
        "image": [encoded(n) for n in range(count)],
        "question": [f"q{n}" for n in range(count)],
        "answer": [str(n) for n in range(count)],
    }
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def check_vqa(out, count=6):
    assert [(row["image"], row["question"], row["answer"]) for row in rows(out)] == [
        (picture(n), f"q{n}", str(n)) for n in range(count)
    ]


def test_saved_parquet_and_streamed_are_the_same_shards(tmp_path):
    table().save_to_disk(tmp_path / "saved")
    table().to_parquet(tmp_path / "table.parquet")
    build(tmp_path / "saved", tmp_path / "a", type="hf", max_samples=4)
    build(tmp_path / "table.parquet", tmp_path / "b", type="hf", max_samples=4)
    build(tmp_path / "table.parquet", tmp_path / "c", type="hf", max_samples=4, streaming=True)
    check_vqa(tmp_path / "a")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_columns_of_paths_in_csv_and_json_beside_their_pictures(tmp_path):
    names = write_pictures(tmp_path, 6)
    (tmp_path / "t.csv").write_text("image,question,answer\n" + "".join(f"{n},q{i},{i}\n" for i, n in enumerate(names)))
    build(tmp_path / "t.csv", tmp_path / "a", type="hf")
    assert [row["image"] for row in rows(tmp_path / "a")] == [picture(n) for n in range(6)]
    assert rows(tmp_path / "a")[3]["question"] == "q3"


def test_a_folder_of_pictures(tmp_path):
    names = write_pictures(tmp_path / "folder", 6)
    lines = [json.dumps({"file_name": name, "question": f"q{n}", "answer": str(n)}) for n, name in enumerate(names)]
    (tmp_path / "folder" / "metadata.jsonl").write_text("\n".join(lines))
    build(tmp_path / "folder", tmp_path / "out", type="hf")
    check_vqa(tmp_path / "out")


def test_a_pattern_of_files(tmp_path):
    for number in range(2):
        table(3).to_parquet(tmp_path / f"part-{number}.parquet")
    build(tmp_path / "part-*.parquet", tmp_path / "out", type="hf")
    assert [row["question"] for row in rows(tmp_path / "out")] == ["q0", "q1", "q2"] * 2
    with pytest.raises(DataError, match="part-2"):
        build(tmp_path / "part-{0..9}.parquet", tmp_path / "out2", type="hf")


def test_pictures_of_others_are_not_read(tmp_path):
    """An Image column may hold a path; only one inside the data set, or under a media root, is followed."""
    secret = tmp_path / "home" / "secret.jpg"
    secret.parent.mkdir()
    secret.write_bytes(picture())
    values = {"image": [{"bytes": None, "path": str(secret)}], "question": ["q"], "answer": ["a"]}
    made = datasets.Dataset.from_dict(values).cast_column("image", datasets.Image())
    path = tmp_path / "data" / "t.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(made.data.table, path)  # `datasets` would write the bytes into it
    with pytest.raises(DataError, match="1 x outside"):
        build(path, tmp_path / "out", type="hf")
    build(path, tmp_path / "out", type="hf", media_root=secret.parent)
    assert rows(tmp_path / "out")[0]["image"] == picture()


def test_lists_of_images_and_conversations_as_arrow_stores_them(tmp_path):
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)}),
        }
    )
    messages = [
        {"role": "user", "content": [*[{"type": "image", "text": None}] * 2, {"type": "text", "text": "q"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ]
    values = {"images": [[encoded(0), encoded(1)], [encoded(2)]], "messages": [messages, messages]}
    datasets.Dataset.from_dict(values, features=features).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"row 1: more <image>"):  # known before a byte of any image is read
        build(tmp_path / "saved", tmp_path / "out", type="hf")
    summary = build(tmp_path / "saved", tmp_path / "out", type="hf", skip_bad=True)
    assert summary.skipped == {"conversation": 1}
    row = rows(tmp_path / "out")[0]
    assert row["image"] == [picture(0), picture(1)]
    assert row["messages"][0]["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "q"}]


def test_media_without_a_type(tmp_path):
    """Parquet written by other tools: structs of bytes and path, plain bytes, clips."""
    values = {"image": [encoded(1), None], "clip": [None, mp4()], "question": ["q", "r"], "answer": ["a", "b"]}
    datasets.Dataset.from_dict(values).to_parquet(tmp_path / "t.parquet")
    summary = build(tmp_path / "t.parquet", tmp_path / "out", type="hf")
    assert {"jpg", "mp4", "image", "video"} <= set(opened(tmp_path / "out").columns)
    assert "video_data: true" in summary.config


def test_values_that_only_arrow_has(tmp_path):
    values = {"question": ["q"], "when": [datetime.date(2026, 1, 2)], "sound": [b"RIFFxxxxWAVE"]}
    datasets.Dataset.from_dict(values).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="bytes that are no image or video; leave it out with --drop"):
        build(tmp_path / "saved", tmp_path / "out", type="hf")
    build(tmp_path / "saved", tmp_path / "out", type="hf", drop=("sound",), resume=False, overwrite=True)
    assert rows(tmp_path / "out") == [{"question": "q", "when": "2026-01-02"}]


def test_an_outline_has_no_bytes(tmp_path):
    table(600).save_to_disk(tmp_path / "saved")
    records = RowRecords(BuildSettings(type="hf", out=tmp_path, path=str(tmp_path / "saved")))
    outlined = list(records.outline([0, 299, 300, 599]))
    assert [record.number for record in outlined] == [0, 299, 300, 599]
    assert all(isinstance(record.fields["image"], Held) for record in outlined)
    assert outlined[2].fields["question"] == "q300"


def test_a_shuffled_stream_and_its_limits(tmp_path):
    table(40).to_parquet(tmp_path / "t.parquet")
    settings = {"type": "hf", "streaming": True, "shuffle": 1, "shuffle_buffer": 8}
    summary = build(tmp_path / "t.parquet", tmp_path / "a", **settings)
    build(tmp_path / "t.parquet", tmp_path / "b", **settings)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    questions = [row["question"] for row in rows(tmp_path / "a")]
    assert sorted(questions) == sorted(f"q{n}" for n in range(40)) != questions
    assert "shuffled among 8 records" in summary.notices[0]
    with pytest.raises(DataError, match="--resume needs records that can be read by number"):
        build(tmp_path / "t.parquet", tmp_path / "a", resume=True, **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"path": "{}/nothing"}, "there is no"),
        ({"path": "{}/saved", "split": "test"}, "no split 'test'; set split to one of: train"),
        ({"path": None}, "give the records"),
    ],
)
def test_what_cannot_be_loaded(tmp_path, settings, said):
    datasets.DatasetDict({"train": table()}).save_to_disk(tmp_path / "saved")
    path = settings["path"] and settings["path"].format(tmp_path)
    with pytest.raises(DataError, match=said):
        build_shards(BuildSettings(type="hf", out=tmp_path / "out", path=path, split=settings.get("split")))


def test_png_stays_png_and_16_bit(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(stream, "PNG")
    values = {"image": [{"bytes": stream.getvalue(), "path": None}], "question": ["q"], "answer": ["a"]}
    datasets.Dataset.from_dict(values).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    build(tmp_path / "saved", tmp_path / "out", type="hf")
    assert rows(tmp_path / "out")[0]["png"] == stream.getvalue()
