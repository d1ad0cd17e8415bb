"""JSON sources: lines or a list, media under media_root and nowhere else."""

import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vlm_dist.data.lengths.estimate import estimate_num_tokens
from vlm_dist.data.media.images import decode_image
from vlm_dist.data.media.video import decode_video
from vlm_dist.data.sources import open_source
from vlm_dist.errors import DataError, SkipSample


@pytest.fixture
def media(tmp_path):
    folder = tmp_path / "media"
    (folder / "sub").mkdir(parents=True)
    Image.new("RGB", (280, 280)).save(folder / "large.png")
    Image.new("RGB", (28, 28)).save(folder / "sub" / "small.jpg")
    (tmp_path / "secret.png").write_bytes((folder / "large.png").read_bytes())
    return folder


def jsonl(path, rows, **settings):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    )
    return SimpleNamespace(type="jsonl", path=str(path), **settings)


ROWS = [
    {"image_path": "large.png", "query": "무엇?", "response": "크다"},
    {"image_path": "sub/small.jpg", "query": "what?", "response": "small", "id": 7},
]


@pytest.mark.parametrize("form", ["lines", "list", "pretty list", "bom", "blank lines"])
def test_lines_and_lists_give_the_same_rows(tmp_path, media, form):
    path = tmp_path / ("rows.jsonl" if "list" not in form else "rows.json")
    settings = jsonl(path, ROWS, media_root=media)
    if "list" in form:
        path.write_text(json.dumps(ROWS, ensure_ascii=False, indent=4 if "pretty" in form else None))
    elif form == "bom":
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    elif form == "blank lines":
        path.write_text("\n" + path.read_text().replace("\n", "\r\n\r\n"))
    source = open_source(settings, tmp_path / "index")
    assert len(source) == 2
    assert set(source.columns) == {"image_path", "query", "response", "id"}
    assert source.read(0).fields == {**ROWS[0], "image_path": (media / "large.png").read_bytes()}
    assert source.read(1).fields["id"] == 7
    # where a person finds it: the line in the file, or the number of the record in a list
    place = {"blank lines": "4", "list": "record 2", "pretty list": "record 2"}.get(form, "2")
    assert str(source.origin(1)) == f"rows/{path.name}:{place}"
    again = open_source(settings, tmp_path / "index")  # from the index
    assert [again.origin(row) for row in (0, 1)] == [source.origin(row) for row in (0, 1)]
    lengths = estimate_num_tokens(source.facts(np.array([0, 1])))
    assert lengths[0] > 100 > lengths[1]


def test_conversations_are_delivered_as_they_are(tmp_path, media):
    rows = [{"messages": [{"role": "user", "content": "<image>x.png?"}], "images": ["large.png", "sub/small.jpg"]}]
    path = media / "talks.json"  # media beside the file need no media_root
    path.write_text(json.dumps(rows))
    source = open_source(SimpleNamespace(type="jsonl", path=str(path)), tmp_path / "index")
    fields = source.read(0).fields
    assert fields["messages"] == rows[0]["messages"]
    assert fields["images"] == [(media / name).read_bytes() for name in rows[0]["images"]]


def test_a_source_can_be_pickled_and_an_index_is_kept(tmp_path, media, monkeypatch):
    settings = jsonl(tmp_path / "rows.jsonl", ROWS, media_root=media)
    source = open_source(settings, tmp_path / "index")
    assert pickle.loads(pickle.dumps(source)).read(1).fields == source.read(1).fields
    assert not list(tmp_path.glob("*.arrow"))  # nothing beside the user's file
    monkeypatch.setattr("vlm_dist.data.sources.jsonl._scan", None)
    assert open_source(settings, tmp_path / "index").manifest_hash == source.manifest_hash


def test_changed_content_changes_the_hash_and_is_indexed_again(tmp_path, media):
    settings = jsonl(tmp_path / "rows.jsonl", ROWS, media_root=media)
    before = open_source(settings, tmp_path / "index").manifest_hash
    jsonl(tmp_path / "rows.jsonl", [{**ROWS[0], "response": "작다"}, ROWS[1]])  # of the same length
    assert open_source(settings, tmp_path / "index").manifest_hash != before


@pytest.mark.parametrize("path", ["../secret.png", "sub/../../secret.png", "{root}/secret.png", "link.png"])
def test_nothing_outside_media_root_is_read(tmp_path, media, path):
    (media / "link.png").symlink_to(tmp_path / "secret.png")
    settings = jsonl(tmp_path / "rows.jsonl", [{"image": path.format(root=tmp_path)}], media_root=media)
    with pytest.raises(DataError, match=r"all 1 media files are out of reach.*leads out of media_root.*rows.jsonl:1"):
        open_source(settings, tmp_path / "index")


def test_one_path_that_leads_out_costs_its_sample_alone_and_is_named(tmp_path, media, caplog):
    rows = [ROWS[0], "", {**ROWS[1], "image_path": "../secret.png"}]
    source = open_source(jsonl(tmp_path / "rows.jsonl", rows, media_root=media), tmp_path / "index")
    assert "1 of 2 media files are out of reach" in caplog.text
    assert "(rows.jsonl:3)" in caplog.text
    assert source.read(0).fields["image_path"]
    with pytest.raises(SkipSample, match="leads out of media_root") as skip:
        source.read(1)
    assert skip.value.null_class == "bad_sample"


def test_errors_of_decoding_name_the_file(tmp_path, media):
    (media / "hurt.jpg").write_bytes((media / "sub" / "small.jpg").read_bytes()[:200])
    (media / "hurt.mp4").write_bytes(b"no video")
    row = {"image": "hurt.jpg", "video": "hurt.mp4"}
    fields = pickle.loads(pickle.dumps(open_source(jsonl(tmp_path / "rows.jsonl", [row], media_root=media)))).read(0)
    with pytest.raises(SkipSample, match=r"^hurt\.jpg: cannot decode the image"):
        decode_image(fields.fields["image"])
    with pytest.raises(SkipSample, match=r"^hurt\.mp4: the file is no video"):
        decode_video(fields.fields["video"], num_frames=2)


def test_an_absolute_path_under_media_root_is_fine(tmp_path, media):
    settings = jsonl(tmp_path / "rows.jsonl", [{"image": str(media / "large.png")}], media_root=media)
    assert open_source(settings).read(0).fields["image"] == (media / "large.png").read_bytes()


def test_a_url_is_refused_with_the_way_out(tmp_path, media):
    settings = jsonl(tmp_path / "rows.jsonl", [{"image": "https://host/a.jpg"}], media_root=media)
    with pytest.raises(DataError, match="vlm-dist shards build --from jsonl --path"):
        open_source(settings, tmp_path / "index")


def test_one_missing_file_is_skipped_and_all_missing_is_an_error(tmp_path, media):
    rows = [ROWS[0], {**ROWS[1], "image_path": "gone.png"}]
    source = open_source(jsonl(tmp_path / "rows.jsonl", rows, media_root=media))
    with pytest.raises(SkipSample, match=r"gone\.png"):
        source.read(1)
    with pytest.raises(DataError, match=r"none of the 1 media files.*media_root"):
        open_source(jsonl(tmp_path / "other.jsonl", [rows[1]], media_root=media))


def test_a_damaged_line_is_skipped_and_a_wrong_file_is_an_error(tmp_path, media):
    source = open_source(jsonl(tmp_path / "rows.jsonl", [*ROWS, '{"image_path": "lar'], media_root=media))
    assert len(source) == 3
    with pytest.raises(
        SkipSample, match=r"rows\.jsonl:3: the record is not a JSON object \(not JSON: Unterminated string"
    ):
        source.read(2)
    for text, message in (
        ("a\nb\n", r"no JSON objects, first bad.json:1, bad.json:2 \(not JSON: Expecting value"),
        ("[1]\n", "a number, not an object"),
        ("", "the file is empty"),
        ('[{"a": 1}, {]', "not a valid JSON list"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match=message):
            open_source(SimpleNamespace(type="jsonl", path=str(tmp_path / "bad.json")))


def test_the_caller_may_say_which_columns_are_media(tmp_path, media):
    (media / "noending").write_bytes((media / "large.png").read_bytes())
    settings = jsonl(tmp_path / "rows.jsonl", [{"pic": "noending", "answer": "large.png"}], media_root=media)
    settings.columns = {"image": "pic"}
    fields = open_source(settings, tmp_path / "index", media_columns={"image", "video"}).read(0).fields
    assert fields == {"image": (media / "large.png").read_bytes(), "answer": "large.png"}


def test_several_files_renames_and_limits(tmp_path, media):
    jsonl(tmp_path / "a.jsonl", ROWS)
    settings = jsonl(tmp_path / "b.jsonl", ROWS, media_root=media, columns={"image": "image_path"}, max_samples=3)
    settings.path = str(tmp_path / "*.jsonl")
    source = open_source(settings, tmp_path / "index")
    assert len(source) == 3
    assert source.origin(2).shard == "b.jsonl"
    assert set(source.read(2).fields) == {"image", "query", "response"}
    assert (
        estimate_num_tokens(source.facts(np.array([2, 0]))).tolist()
        == [estimate_num_tokens(source.facts(np.array([0])))[0]] * 2
    )
    with pytest.raises(DataError, match=r"'nope'.*it has: id, image_path, query, response"):
        open_source(SimpleNamespace(**{**vars(settings), "columns": {"image": "nope"}}), tmp_path / "index")


def test_many_rows_are_many_blocks(tmp_path):
    source = open_source(jsonl(tmp_path / "rows.jsonl", [{"text": f"{i}"} for i in range(600)]))
    assert source.shard_sizes == [256, 256, 88]
    assert source.read(599).fields == {"text": "599"}


@pytest.mark.parametrize(
    "odd", ["a\0b.jpg", "x" * 5000 + ".jpg", "\ud800.jpg"], ids=["nul", "too-long", "half-a-character"]
)
def test_what_is_no_path_costs_its_sample_alone(tmp_path, caplog, odd):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.jpg")
    records = [{"image": "0.jpg", "question": "q", "answer": "a"}, {"image": odd, "question": "q", "answer": "a"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = open_source(SimpleNamespace(type="jsonl", path=str(tmp_path / "data.jsonl")), tmp_path / "index")
    assert source.read(0).fields["image"]
    assert "1 of 2 media files are missing" in caplog.text
    caplog.text.encode()  # whatever the path is, its warning can be written to a log file
    with pytest.raises(SkipSample, match="no path"):
        source.read(1)
