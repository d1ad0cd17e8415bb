"""Build, then put what it printed into a run file, and train: nothing else is needed."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.e2e.media import CHINA, FLOWER
from tests.e2e.preloaded import Preloaded
from tests.tiny_run import TinyRun
from vlm_dist.build import make_materialisers, make_processor, open_sources_alone
from vlm_dist.config import load_run
from vlm_dist.data.quarantine import read_quarantine
from vlm_dist.data.types import MicroBatch, MicroBatchJob, SampleRef
from vlm_dist.demo.digits import encode_clip

pytestmark = pytest.mark.e2e


def encoded(pixels: np.ndarray, image_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, image_format, **options)
    return stream.getvalue()


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


LLAVA = [
    {"id": "1", "image": "china.jpg", "conversations": turns("<image>\nWhat is this?", "A pagoda.")},
    {"id": "2", "image": ["china.jpg", "flower.webp"], "conversations": turns("<image>One. <image>Two.", "Yes.")},
    {"id": "3", "conversations": turns("Why?", "So.", "Really?", "Really.")},
    {"id": "4", "video": "pan.mp4", "conversations": turns("<video>What moves?", "The camera.")},
]
OPENAI = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "flower.webp"}},
                    {"type": "text", "text": "What is this?"},
                ],
            },
            {"role": "assistant", "content": "A dahlia."},
        ]
    }
] * 4
VQA = [{"image": ("china.jpg", "flower.webp")[n % 2], "query": "What is this?", "label": "It."} for n in range(4)]
TEXT = [{"question": "Why?", "answer": "So."}] * 4
CLIPS = [{"clip": "pan.mp4", "question": "What moves?", "answer": "The camera."}] * 4


@pytest.fixture(scope="module")
def run(empty_run: TinyRun) -> TinyRun:
    directory = empty_run.directory
    (directory / "media").mkdir()
    (directory / "media" / "china.jpg").write_bytes(encoded(CHINA, "JPEG", quality=85))
    (directory / "media" / "flower.webp").write_bytes(encoded(FLOWER, "WEBP"))
    frames = [CHINA[:224:4, left : left + 224 : 4] for left in range(0, 160, 20)]
    (directory / "media" / "pan.mp4").write_bytes(encode_clip(frames))
    for name, records in (("llava", LLAVA), ("openai", OPENAI), ("vqa", VQA), ("text", TEXT), ("clips", CLIPS)):
        (directory / f"{name}.json").write_text(json.dumps(records))
    return empty_run


def write_run_file(run: TinyRun, name: str, printed: str) -> Path:
    """A run file with the shipped configuration and what the build printed."""
    overrides = yaml.safe_load(printed[printed.index("\ndata: #") :])
    overrides["train"] = {
        "output_dir": f"{name}-run",
        "report_to": "none",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "bf16": False,
    }
    overrides["model"] = {"loading_params": {"device_map": None, "torch_dtype": "float32"}}
    document = {"model": "model", "deepspeed": "../ds_configs/zero2.json", "overrides": overrides}
    path = run.directory / "configs" / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def build(run: TinyRun, process: Preloaded, name: str, options: list[str]) -> Path:
    """Build shards of one of the files, and write a run file with the lines that the command prints."""
    arguments = ["--path", f"{name}.json", "--media-root", "media", "--out", f"data/{name}", "--max-samples", "2"]
    ended = process.run("vlm_dist.cli", ["shards", "build", *arguments, "--overwrite", *options], run.directory)
    assert ended.exit_code == 0, ended.output
    assert "4 samples in 2 shards" in ended.stdout
    return write_run_file(run, name, ended.stdout)


def batches(path: Path) -> Iterator[tuple[MicroBatch, str]]:
    """Every sample as a micro-batch of its own, and the text of its first row."""
    config = load_run(path, [])
    sources = open_sources_alone(config, "train")
    processor, family = make_processor(config)
    materialise = make_materialisers(config, sources, [], processor, family)
    for row in range(len(sources[0])):
        batch = materialise(MicroBatchJob(0, 0, (SampleRef(0, row),)))
        yield batch, processor.tokenizer.decode(batch.inputs["input_ids"][0])


@pytest.mark.parametrize(
    ("name", "options", "shown"),
    [
        ("llava", ["--key-column", "id"], [(1, 0), (2, 0), (0, 0), (0, 1)]),
        ("openai", [], [(1, 0)] * 4),
        ("vqa", [], [(1, 0)] * 4),
        ("text", [], [(0, 0)] * 4),
        ("clips", [], [(0, 1)] * 4),
    ],
)
def test_what_is_printed_trains(
    run: TinyRun, process: Preloaded, name: str, options: list[str], shown: list[tuple[int, int]]
) -> None:
    path = build(run, process, name, options)
    checked = process.run("vlm_dist.cli", ["config", str(path)], run.directory)
    assert checked.exit_code == 0, checked.output
    for (batch, text), (num_images, num_videos) in zip(batches(path), shown, strict=True):
        assert not batch.null_slots
        assert batch.num_target_tokens > 0
        text = text[: text.rindex("<|im_end|>")]  # behind it stands in what the run has, but not this sample
        assert len(re.findall(r"(?:<\|image_pad\|>)+", text)) == num_images, text
        assert len(re.findall(r"(?:<\|video_pad\|>)+", text)) == num_videos, text


def test_it_trains(run: TinyRun, process: Preloaded) -> None:
    """The real command line, over the conversations with pictures, clips and text alone."""
    path = build(run, process, "llava", ["--key-column", "id"])
    ended = process.run("vlm_dist.train", ["--config", str(path)], run.directory, timeout_seconds=120)
    assert ended.exit_code == 0, ended.output
    assert len(run.metrics("llava-run")) == 2
    assert not read_quarantine(run.directory / "llava-run")
