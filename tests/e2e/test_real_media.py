"""Pictures and clips of natural size: conversations, labels, lengths."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.e2e.media import write_media
from tests.tiny_run import TinyRun
from vlm_dist.build import make_materialisers, make_processor, open_sources_alone
from vlm_dist.config import load_run
from vlm_dist.data.quarantine import read_quarantine
from vlm_dist.data.types import IGNORE_INDEX, MicroBatch, MicroBatchJob, SampleRef

pytestmark = pytest.mark.e2e

USER, ASSISTANT = "user", "assistant"


def talk(*turns: str, **media: object) -> dict:
    """A conversation in ShareGPT's form; the turns alternate, the user begins."""
    messages = [{"content": text, "role": (USER, ASSISTANT)[i % 2]} for i, text in enumerate(turns)]
    return {"messages": messages, **media}


TALKS = [
    talk(
        "<image>What is this?",
        "A pagoda on a hill in China.",
        "And this?<image>",
        "A dahlia, in full bloom.",
        images=["china.jpg", "flower.jpg"],
    ),
    talk("<image>这是什么？", "这是中国的一座宝塔。", "它在哪里？", "在山上，周围有树。", images=["china.jpg"]),
    talk("<image>Which way is up?", "The temple stands on the ground.", images=["upright.jpg"]),
    talk("<image>What colours?", "Those of a printing press.", images=["cmyk.jpg"]),
    talk("<image>How many colours?", "At most sixteen.", images=["palette.png"]),
    talk("<image>Is it large?", "Yes, six megapixels.", images=["large.jpg"]),
    talk("<image>Is it wide?", "Very wide.", images=["wide.jpg"]),
]
CLIPS = [
    talk("<video>What moves?", "The camera, to the right.", videos=["pan.mp4"]),
    talk("<video>什么在动？", "镜头向右移动。", videos=["pan.avi"]),
]


@dataclass
class Walk:
    """A working directory with the tiny model, the shipped configs, and real media."""

    run: TinyRun

    @property
    def directory(self) -> Path:
        return self.run.directory

    def batches(self, run_file: str, *overrides: str) -> Iterator[tuple[MicroBatch, str]]:
        """Every training sample as a micro-batch of its own, and its text with `[n]` for n visual tokens."""
        config = load_run(self.directory / "configs" / run_file, overrides)
        sources = open_sources_alone(config, "train")
        processor, family = make_processor(config)
        materialise = make_materialisers(config, sources, [], processor, family)
        for number, opened in enumerate(sources):
            for row in range(len(opened)):
                batch = materialise(MicroBatchJob(0, 0, (SampleRef(number, row),)))
                text = processor.tokenizer.decode(batch.inputs["input_ids"][0])
                end = text.rindex("<|im_end|>") + len("<|im_end|>\n")
                text = text[:end]  # behind it stands what the run shows, but not this sample
                yield batch, re.sub(r"(<\|(?:image|video)_pad\|>)+", lambda m: f"[{m[0].count('pad')}]", text)

    def targets(self, batch: MicroBatch) -> str:
        """What carries loss, as text."""
        config = load_run(self.directory / "configs" / "talks.yaml")
        processor, _ = make_processor(config)
        labels = batch.labels[0]
        return processor.tokenizer.decode(labels[labels != IGNORE_INDEX])


@pytest.fixture(scope="module")
def walk(empty_run: TinyRun) -> Walk:
    directory = empty_run.directory
    write_media(directory / "media")
    (directory / "talks.jsonl").write_text("\n".join(json.dumps(one, ensure_ascii=False) for one in TALKS))
    (directory / "clips.json").write_text(json.dumps(CLIPS, indent=2))
    run_file = {
        "model": "model",
        "deepspeed": "../ds_configs/zero2.json",
        "overrides": {
            # the real Qwen2-VL's own limits: the tiny one's would make all pictures equal
            "model": {"processor_params": {"min_pixels": 56 * 56, "max_pixels": 12845056}},
            "collator": {
                "dataset_columns": {
                    "messages_column": "messages",
                    "image_column": "images",
                    "video_column": "videos",
                },
                "data_processing": {"image_data": True, "video_data": True},
                "label_masking": {"mask_input_tokens": True},
            },
            "train": {
                "output_dir": "talked",
                "report_to": "none",
                "per_device_train_batch_size": 3,
                "gradient_accumulation_steps": 1,
                "logging_steps": 1,
            },
            "data": {
                "index_dir": "index",
                "train": [
                    {"type": "jsonl", "path": "talks.jsonl", "media_root": "media"},
                    {"type": "jsonl", "path": "clips.json", "media_root": "media"},
                ],
            },
        },
    }
    (directory / "configs" / "talks.yaml").write_text(yaml.safe_dump(run_file))
    return Walk(empty_run)


def answers(conversation: dict) -> Sequence[str]:
    return [turn["content"] for turn in conversation["messages"] if turn["role"] == ASSISTANT]


def test_labels_cover_exactly_the_turns_of_the_assistant(walk: Walk) -> None:
    for (batch, _), conversation in zip(walk.batches("talks.yaml"), [*TALKS, *CLIPS], strict=True):
        assert not batch.null_slots
        assert walk.targets(batch) == "".join(answer + "<|im_end|>" for answer in answers(conversation))


def test_the_text_has_its_pictures_in_their_places(walk: Walk) -> None:
    shown = [text for _, text in walk.batches("talks.yaml")]
    assert shown[0] == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|>[345]<|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\nA pagoda on a hill in China.<|im_end|>\n"
        "<|im_start|>user\nAnd this?<|vision_start|>[345]<|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\nA dahlia, in full bloom.<|im_end|>\n"
    )
    assert "这是什么？" in shown[1]


def test_all_kinds_of_files_are_read(walk: Walk) -> None:
    """Rotated by EXIF, CMYK, palette: the picture is the same 23 x 15 tokens; clips of both containers are equal."""
    batches = [batch for batch, _ in walk.batches("talks.yaml")]
    plain = batches[1].inputs
    assert plain["image_grid_thw"].tolist() == [[1, 30, 46]]
    for index in (2, 3, 4):
        inputs = batches[index].inputs
        assert inputs["image_grid_thw"].tolist() == [[1, 30, 46]], TALKS[index]
        difference = (inputs["pixel_values"] - plain["pixel_values"]).abs().mean()
        assert difference < 0.25, f"{TALKS[index]['images']}: {difference}"  # of a standard deviation of 1
    mp4, avi = (batch.inputs for batch in batches[-2:])
    assert mp4["video_grid_thw"].tolist() == avi["video_grid_thw"].tolist() == [[4, 18, 22]]  # 8 frames, 252 x 308
    assert (mp4["pixel_values_videos"] - avi["pixel_values_videos"]).abs().mean() < 0.02


def test_large_pictures_are_made_smaller_to_fit(walk: Walk) -> None:
    for (batch, text), conversation in zip(walk.batches("talks.yaml"), [*TALKS, *CLIPS], strict=True):
        is_large = conversation.get("images") == ["large.jpg"]
        assert batch.num_reduced == is_large, text
        assert batch.num_cut == 0
        assert batch.num_tokens <= 2048
        if is_large:
            assert batch.num_tokens > 1800  # not smaller than it must be
    large = [batch for batch, _ in walk.batches("talks.yaml")][5]
    _, height, width = large.inputs["image_grid_thw"][0].tolist()
    assert width / height == pytest.approx(1.5, rel=0.06)


def test_nothing_vanishes_where_little_fits(walk: Walk) -> None:
    """192 tokens for two photographs and two turns: smaller pictures, but no sample is lost."""
    for batch, text in walk.batches("talks.yaml", "collator.text_processing.max_length=192"):
        assert not batch.null_slots, text
        assert batch.num_samples == 1
        assert batch.num_tokens <= 192


def test_with_the_defaults_of_the_guide_no_sample_is_lost(walk: Walk) -> None:
    """mask_input_tokens false: all but the visual tokens carry loss."""
    for batch, text in walk.batches("talks.yaml", "collator.label_masking.mask_input_tokens=false"):
        assert not batch.null_slots, text
        num_visual = sum(int(count) for count in re.findall(r"\[(\d+)\]", text))
        assert batch.num_target_tokens == batch.num_tokens - num_visual - 1  # and nothing predicts the first
        assert num_visual >= 345


def test_it_trains(walk: Walk) -> None:
    """The real command line with shipped defaults: bf16, checkpointing, grouped lengths, two data workers."""
    ended = walk.run.command(["python", "-m", "vlm_dist.train", "--config", "configs/talks.yaml"])
    assert ended.exit_code == 0, ended.output
    assert "Traceback" not in ended.output
    metrics = walk.run.metrics("talked")
    assert len(metrics) == 3
    assert all(0 < record["loss"] < 20 for record in metrics)
    assert not any(record[key] for record in metrics for key in record if key.startswith("null_slots/"))
    assert not read_quarantine(walk.directory / "talked")
