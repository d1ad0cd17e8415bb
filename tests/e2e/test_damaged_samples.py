"""Damaged samples among others: counted, written down, and no rank waits for another."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.e2e.media import CHINA
from tests.tiny_run import make_tiny_run
from vlm_dist.data.quarantine import read_quarantine
from vlm_dist.data.shards.writer import ShardWriter
from vlm_dist.demo.digits import encode_clip, encode_png

pytestmark = pytest.mark.e2e

DAMAGED = {
    ("images", "000003"): ("decode", "image"),
    ("images", "000007"): ("decode", "image"),
    ("images", "000010"): ("bad_sample", "question"),
    ("clips", "000002"): ("decode", "video"),
}


def write_damaged(directory: Path) -> None:
    """12 pictures and 4 clips: a PNG cut in half, a web page named .jpg, a sample without question, half a clip."""
    with ShardWriter(directory / "data" / "hurt-images", prefix="images", max_samples=5) as writer:
        for number in range(12):
            picture = encode_png(CHINA[::8, ::8])
            sample: dict = {
                "__key__": f"{number:06d}",
                "json": {"question": "What?", "answer": "A pagoda.", "video": None},
            }
            if number == 3:
                picture = picture[: len(picture) // 2]
            if number == 7:
                picture = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
            if number == 10:
                del sample["json"]["question"]
            writer.write(sample | {"jpg": picture})
    with ShardWriter(directory / "data" / "hurt-clips", prefix="clips") as writer:
        for number in range(4):
            clip = encode_clip([CHINA[:224:4, left : left + 224 : 4] for left in (0, 200)])
            text = {"question": "What?", "answer": "A pan.", "image": None}
            clip = clip[: len(clip) // 3] if number == 2 else clip
            writer.write({"__key__": f"{number:06d}", "mp4": clip, "json": text})


def test_damaged_samples_on_two_ranks_under_zero3(tmp_path: Path) -> None:
    """One epoch in micro-batches of one, so that a damaged sample leaves a rank with nothing but a dummy."""
    run = make_tiny_run(tmp_path, num_images=1, num_clips=1)
    write_damaged(tmp_path)
    hurt = [
        {"name": "images", "type": "tar", "path": "data/hurt-images", "columns": {"image": "jpg"}},
        {"name": "clips", "type": "tar", "path": "data/hurt-clips", "columns": {"video": "mp4"}},
    ]
    ended = run.train(
        "deepspeed=ds_configs/tiny3.json",
        f"data.train={json.dumps(hurt)}",
        "data.eval=[]",
        "train.per_device_train_batch_size=1",
        "train.max_steps=-1",
        processes=2,
    )
    assert ended.exit_code == 0, ended.output
    assert "Traceback" not in ended.output
    metrics = run.metrics("run")
    assert [record["step"] for record in metrics] == [1, 2, 3, 4]  # 16 samples in steps of 2 x 2
    counted = {
        name: sum(record[f"null_slots/{name}"] for record in metrics) for name in ("decode", "bad_sample", "tail")
    }
    assert counted == {"decode": 3, "bad_sample": 1, "tail": 0}
    assert all(record["loss"] is not None for record in metrics)
    written = read_quarantine(tmp_path / "run")
    assert {(line["source"], line["key"]) for line in written} == set(DAMAGED)
    for line in written:
        null_class, word = DAMAGED[line["source"], line["key"]]
        assert line["class"] == null_class
        assert word in line["message"]
        assert line["shard"].endswith(".tar")
    assert len(written) == len(DAMAGED)
    told = re.findall(r"(\S+) is skipped", ended.output)
    assert sorted(told) == sorted(f"{line['source']}/{line['shard']}:{line['key']}" for line in written)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
