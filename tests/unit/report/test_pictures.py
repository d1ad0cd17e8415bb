"""Pictures of samples are made by a process that may die, hang or meet anything."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.unit.report.runs import make_run, train_line
from vlm_dist.data.shards.writer import ShardWriter
from vlm_dist.report import pictures
from vlm_dist.report.pictures import Wanted, take_pictures
from vlm_dist.report.run_files import read_run


def jpeg(size: tuple[int, int] = (600, 400)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (200, 40, 40)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def run(tmp_path: Path):
    whole = jpeg()
    samples = {"whole": whole, "cut": whole[: len(whole) // 2], "noise": b"\x07" * 500}
    with ShardWriter(tmp_path / "data", prefix="odd", max_samples=16) as writer:
        for key, data in samples.items():
            writer.write({"__key__": key, "jpg": data, "json": {"answer": "a"}})
    path = make_run(tmp_path / "run", [train_line(1)])
    sources = [
        {"name": "odd", "type": "tar", "path": "data", "columns": {"image": "jpg"}, "where": {}, "subset": None},
        {"name": "far", "type": "tar", "path": "https://host/data.tar", "columns": {}},
    ]
    (path / "resolved_config.yaml").write_text(yaml.safe_dump({"data": {"train": sources, "eval": []}}))
    # paths of the configuration start from where the run was started
    (path / "environment.json").write_text(json.dumps({"lives": [{"life": 1, "working_directory": str(tmp_path)}]}))
    return read_run(path)


def test_whole_and_half_pictures_are_shown_and_others_say_why_not(run):
    shard = "odd-000000.tar"
    wanted = [Wanted(0, "train", "odd", shard, key) for key in ("whole", "cut", "noise", "gone")]
    far = Wanted(0, "train", "far", "data.tar", "key")
    shots = take_pictures(run, 0, [*wanted, far])
    whole, cut, noise, gone = (shots[one] for one in wanted)
    assert Image.open(io.BytesIO(whole.pictures[0])).size == (176, 117) and whole.note == ""
    assert len(cut.pictures) == 1 and cut.note == "only a part can be decoded"
    assert noise.pictures == () and noise.note == "nothing of it can be decoded"
    assert gone.note == "it is no longer there"
    assert shots[far].note == "its data is not on this machine"


def test_a_sample_that_ends_or_holds_up_its_decoder_costs_only_itself(run, monkeypatch):
    monkeypatch.setattr(pictures, "_MODULE", "tests.unit.report.deadly_process")
    monkeypatch.setattr(pictures, "SAMPLE_SECONDS", 3.0)
    wanted = [Wanted(0, "train", "odd", "s", key) for key in ("first", "deadly", "second", "endless", "third")]
    shots = take_pictures(run, 0, wanted)
    told = [(one.key, shots[one].pictures[0][3:] if shots[one].pictures else shots[one].note) for one in wanted]
    assert told == [
        ("first", b"first"),
        ("deadly", "its decoder ended the process"),
        ("second", b"second"),
        ("endless", "decoding took too long and was ended"),
        ("third", b"third"),
    ]
