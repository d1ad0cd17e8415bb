"""JSON records and their media become shards that train, and what cannot is told before anything is written."""

import json

import pytest
import yaml

from tests.unit.data.building import build, contents, keys, opened, picture, rows, write_lines, write_pictures
from tests.unit.data.samples import mp4
from vlm_dist.config.vlm_collator import VlmCollatorConfig
from vlm_dist.data.encoding.template import MessageBuilder
from vlm_dist.data.index.manifest import read_manifest
from vlm_dist.errors import DataError


def vqa(count):
    return [{"image": f"{n}.jpg", "question": f"q{n}", "answer": n} for n in range(count)]


def conversations_of(out, summary, kinds=("image", "video")):
    """What the printed configuration makes of the shards."""
    config = VlmCollatorConfig.model_validate(yaml.safe_load(summary.config).get("collator", {}))
    builder = MessageBuilder(config.dataset_columns.mapping, config.message_format, frozenset(kinds))
    return [builder.build(row) for row in rows(out)]


def test_pictures_with_questions(tmp_path):
    write_pictures(tmp_path / "media", 5)
    (tmp_path / "media" / "3.jpg").write_bytes(picture(3, "PNG"))  # named by content, not by name
    path = write_lines(tmp_path / "vqa.jsonl", vqa(5))
    summary = build(path, tmp_path / "out", media_root=tmp_path / "media", max_samples=2)
    assert (summary.num_samples, summary.num_shards, summary.skipped) == (5, 3, {})
    assert read_manifest(tmp_path / "out").num_samples == 5
    source = opened(tmp_path / "out")
    assert {"image", "question", "answer"} <= set(source.columns)
    assert [source.origin(n).key for n in range(5)] == [f"{n:09d}" for n in range(5)]
    for number, row in enumerate(rows(tmp_path / "out")):
        assert (row["question"], row["answer"]) == (f"q{number}", number)
        assert row["image"] == picture(number, "PNG" if number == 3 else "JPEG")
    assert yaml.safe_load(summary.config) == {"data": {"train": [{"type": "tar", "path": str(tmp_path / "out")}]}}


def test_the_same_records_give_the_same_bytes(tmp_path):
    write_pictures(tmp_path, 20)
    path = write_lines(tmp_path / "vqa.jsonl", vqa(20))
    for name, workers in (("a", 1), ("b", 7)):
        build(path, tmp_path / name, workers=workers, max_samples=6, shuffle=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    shuffled = keys(tmp_path / "a")
    assert sorted(shuffled) == [f"{n:09d}" for n in range(20)] != shuffled
    build(path, tmp_path / "c", max_samples=6, shuffle=4, limit=7)
    assert len(keys(tmp_path / "c")) == 7


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


LLAVA = [
    {"id": "a/1", "image": "0.jpg", "conversations": turns("<image>\nWho?", "x")},
    {"id": "a/2", "image": ["1.jpg", "2.jpg"], "conversations": turns("<image><image>Who?", "y")},
    {"id": "a/3", "conversations": turns("Why?", "z")},
    {"id": "a/4", "video": "v.mp4", "conversations": turns("<video>What?", "w")},
]


def test_llava_conversations_train_with_the_printed_configuration(tmp_path):
    write_pictures(tmp_path, 3)
    (tmp_path / "v.mp4").write_bytes(mp4())
    (tmp_path / "llava.json").write_text(json.dumps(LLAVA, indent=1))
    summary = build(tmp_path / "llava.json", tmp_path / "out", key_column="id")
    assert keys(tmp_path / "out") == ["a/1", "a/2", "a/3", "a/4"]
    made = conversations_of(tmp_path / "out", summary)
    assert [one.images for one in made] == [[picture(0)], [picture(1), picture(2)], [], []]
    assert [len(one.videos) for one in made] == [0, 0, 0, 1]
    assert [one.messages[1]["content"][0]["text"] for one in made] == ["x", "y", "z", "w"]
    printed = yaml.safe_load(summary.config)["collator"]
    assert printed["dataset_columns"] == {"messages_column": "conversations"}
    assert printed["data_processing"] == {"image_data": True, "video_data": True}


def test_openai_messages_name_their_files_inside(tmp_path):
    write_pictures(tmp_path, 12)
    content = [
        {"type": "text", "text": "these"},
        *({"type": "image_url", "image_url": {"url": f"{n}.jpg"}} for n in range(12)),
    ]
    records = [
        {"messages": [{"role": "user", "content": "none"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]},
    ]  # fmt: skip
    summary = build(write_lines(tmp_path / "m.jsonl", records), tmp_path / "out")
    none, twelve = conversations_of(tmp_path / "out", summary)
    assert none.images == []
    assert twelve.images == [picture(n) for n in range(12)]  # in order, also beyond nine
    assert [part["type"] for part in twelve.messages[0]["content"]] == ["text", *["image"] * 12]


def test_text_alone(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", [{"question": "q", "answer": "a"}] * 3)
    summary = build(path, tmp_path / "out")
    config = VlmCollatorConfig.model_validate(yaml.safe_load(summary.config)["collator"])
    builder = MessageBuilder(config.dataset_columns.mapping, config.message_format, frozenset())
    assert builder.build(rows(tmp_path / "out")[0]).texts == ["q", "a"]


def test_names_of_ones_own(tmp_path):
    """Two columns of pictures: the first is `image`; renamed, dropped and declared columns."""
    write_pictures(tmp_path, 4, ".img")
    records = [
        {"left": f"{n}.img", "right": [f"{n}.img", "0.img"], "query": "q", "reply": "r", "junk": 1} for n in range(4)
    ]
    summary = build(
        write_lines(tmp_path / "t.jsonl", records), tmp_path / "out",
        image_columns=("left", "right"), columns={"question": "query"}, drop=("junk",),
    )  # fmt: skip
    row = rows(tmp_path / "out")[2]
    assert (row["image"], row["right"]) == (picture(2), [picture(2), picture(0)])
    assert "junk" not in row and row["question"] == "q"
    assert "answer_column: name one of" in summary.config


def test_values_that_json_has_no_form_for(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", ['{"question": "q", "answer": NaN}'])
    build(path, tmp_path / "out")
    assert rows(tmp_path / "out")[0]["answer"] is None


BAD = [
    "no json",
    {"image": "missing.jpg", "question": "q", "answer": "a"},
    {"image": "../secret.jpg", "question": "q", "answer": "a"},
    {"image": 7, "question": "q", "answer": "a"},
]


def write_bad(tmp_path):
    write_pictures(tmp_path / "media", 10)
    (tmp_path / "secret.jpg").write_bytes(picture())
    records = [*vqa(3), *BAD, *({**one, "image": f"{n + 5}.jpg"} for n, one in enumerate(vqa(5)))]
    return write_lines(tmp_path / "media" / "vqa.jsonl", records)


def test_bad_records_are_told_all_at_once_before_anything_is_written(tmp_path):
    path = write_bad(tmp_path)
    with pytest.raises(DataError, match="4 of 12 records cannot be used") as caught:
        build(path, tmp_path / "out")
    for said in ("1 x missing_media", "1 x outside", "1 x malformed", "1 x bad_media", "vqa.jsonl:4: ", "--skip-bad"):
        assert said in str(caught.value)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_bad_records_can_be_left_out(tmp_path):
    path = write_bad(tmp_path)
    (tmp_path / "media" / "6.jpg").write_text("<!DOCTYPE html>")
    (tmp_path / "media" / "7.jpg").write_bytes(picture(7)[:150])
    summary = build(path, tmp_path / "out", skip_bad=True)
    assert summary.skipped == {"malformed": 1, "missing_media": 1, "outside": 1, "bad_media": 3}
    assert len(rows(tmp_path / "out")) == summary.num_samples == 6
    report = [json.loads(line) for line in summary.report.read_text().splitlines()]
    assert [line["record"] for line in report] == [3, 4, 5, 6, 8, 9]
    assert "a web page" in report[4]["message"]


def test_a_picture_that_breaks_off_is_found_by_decoding(tmp_path):
    write_pictures(tmp_path, 2)
    whole = picture(1, "PNG", (64, 64))
    (tmp_path / "1.jpg").write_bytes(whole[: len(whole) - 30])
    path = write_lines(tmp_path / "vqa.jsonl", vqa(2))
    assert build(path, tmp_path / "a").num_samples == 2
    with pytest.raises(DataError, match=r"vqa\.jsonl:2: 1\.jpg.*--resume"):
        build(path, tmp_path / "b", verify_images=True)


def talk(*texts, **more):
    return {"messages": [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)], **more}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (talk("<image><image>q", "a", image="0.jpg"), "more <image>"),
        (talk("<image>q", "a", image=["0.jpg", "1.jpg"]), "1 <image> in the messages, but 2 images"),
        (talk("<image>q", image="0.jpg"), "not the assistant's"),
        ({"messages": [{"role": "robot", "content": "q"}], "image": "0.jpg"}, "message that is not"),
        ({"messages": "", "image": "0.jpg"}, "no list of messages"),
    ],
)
def test_conversations_are_checked(tmp_path, record, said):
    write_pictures(tmp_path, 2)
    path = write_lines(tmp_path / "t.jsonl", [talk("<image>q", "a", image="0.jpg"), record])
    with pytest.raises(DataError, match=said):
        build(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"key_column": "uid"}, "no column 'uid'; there are: image, question"),
        ({"columns": {"question": "query"}}, "maps to 'query'"),
        ({"drop": ("query",)}, "--drop: there is no column"),
        ({"media_root": "nowhere"}, "does not exist"),
        ({"streaming": True}, "--streaming is for --from hf"),
        ({"max_samples": 0, "workers": 0}, "--workers must be positive"),
        ({"prefix": "a/b"}, "must be a file name"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, settings, said):
    if "media_root" in settings:
        settings["media_root"] = tmp_path / settings["media_root"]
    write_pictures(tmp_path, 2)
    with pytest.raises(DataError, match=said):
        build(write_lines(tmp_path / "t.jsonl", vqa(2)), tmp_path / "out", **settings)


def test_shards_are_not_replaced_by_accident_and_then_all_at_once(tmp_path):
    write_pictures(tmp_path, 6)
    path = write_lines(tmp_path / "t.jsonl", vqa(6))
    build(path, tmp_path / "out", max_samples=2)
    with pytest.raises(DataError, match="already"):
        build(path, tmp_path / "out")
    build(path, tmp_path / "out", max_samples=4, overwrite=True)
    assert len(rows(tmp_path / "out")) == 6
    assert read_manifest(tmp_path / "out").num_samples == 6
