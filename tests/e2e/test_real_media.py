"""Pictures and clips of natural size: conversations, labels, lengths; damaged samples; Hugging Face data sets."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.e2e.preloaded import Preloaded, preloaded
from tests.tiny_run import SHAPE, TinyRun, make_tiny_run, write_configs
from vlm_dist.build import make_materialisers, make_processor, open_sources_alone
from vlm_dist.config import load_run
from vlm_dist.data.quarantine import read_quarantine
from vlm_dist.data.shards.writer import ShardWriter
from vlm_dist.data.types import IGNORE_INDEX, MicroBatch, MicroBatchJob, SampleRef
from vlm_dist.demo.digits import encode_clip, encode_png
from vlm_dist.demo.tiny_model import save_tiny_qwen2_vl

pytestmark = pytest.mark.e2e

CHINA, FLOWER = (np.asarray(picture) for picture in load_sample_images().images)  # real photographs, 640 x 427

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


def encode_pan(container: str) -> bytes:
    """3 s of h264 at 320 x 240: a window that moves over a photograph."""
    stream = io.BytesIO()
    with av.open(stream, mode="w", format=container) as out:
        video = out.add_stream("libx264", rate=Fraction(15), options={"crf": "28", "threads": "1"})
        video.width, video.height, video.pix_fmt = 320, 240, "yuv420p"
        for number in range(45):
            left = number * 7
            frame = np.ascontiguousarray(CHINA[100:340, left : left + 320])
            out.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(video.encode(None))
    return stream.getvalue()


def write_media(directory: Path) -> None:
    directory.mkdir()
    china = Image.fromarray(CHINA)
    china.save(directory / "china.jpg", quality=85)
    Image.fromarray(FLOWER).save(directory / "flower.jpg", quality=85)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    china.rotate(90, expand=True).save(directory / "upright.jpg", exif=exif)
    china.convert("CMYK").save(directory / "cmyk.jpg")
    china.quantize(16).save(directory / "palette.png")
    china.resize((3000, 2000)).save(directory / "large.jpg", quality=50)
    china.resize((6000, 200)).save(directory / "wide.jpg", quality=50)
    for container, name in (("mp4", "pan.mp4"), ("avi", "pan.avi")):
        (directory / name).write_bytes(encode_pan(container))


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
def process() -> Iterator[Preloaded]:
    with preloaded() as started:
        yield started


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    directory = tmp_path_factory.mktemp("media")
    save_tiny_qwen2_vl(directory / "model", SHAPE, dtype=torch.float32)
    write_configs(directory, torch.float32)
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
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        yield Walk(TinyRun(directory))


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


def hf_overrides(path: str, **settings: object) -> list[str]:
    source = {"type": "hf", "path": path, **settings}
    overrides = [
        "model_id=model",
        f"data.train={json.dumps([source])}",
        "data.index_dir=index",
        "train.report_to=none",
        "train.max_steps=2",
        "train.per_device_train_batch_size=2",
        "train.logging_steps=1",
        "train.dataloader_num_workers=0",
    ]
    return [part for override in overrides for part in ("--set", override)]


def test_a_saved_data_set_with_an_image_feature(walk: Walk, process: Preloaded) -> None:
    """Columns image, question, answer are the guide's: only the data set is named."""
    rows = {
        "image": [Image.fromarray(CHINA[::4, ::4]), Image.fromarray(FLOWER[::4, ::4])] * 4,
        "question": ["What is it?"] * 8,
        "answer": ["A pagoda.", "A dahlia."] * 4,
    }
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data.save_to_disk(walk.directory / "vqa")
    arguments = [*hf_overrides("vqa"), "--set", "train.output_dir=hf-image"]
    ended = process.run("vlm_dist.train", arguments, walk.directory, timeout_seconds=120)
    assert ended.exit_code == 0, ended.output
    assert len(walk.run.metrics("hf-image")) == 2
    assert not read_quarantine(walk.directory / "hf-image")
    # and the same directory as a DatasetDict, whose only split is found by itself
    datasets.DatasetDict({"train": data}).save_to_disk(walk.directory / "vqa-splits")
    arguments = [*hf_overrides("vqa-splits"), "--set", "train.output_dir=hf-split"]
    again = process.run("vlm_dist.train", arguments, walk.directory, timeout_seconds=120)
    assert again.exit_code == 0, again.output
    assert walk.run.losses("hf-split") == walk.run.losses("hf-image")


def test_a_data_set_with_paths_and_columns_of_its_own(walk: Walk, process: Preloaded) -> None:
    """The guide's first scenario: ['image_path', 'query', 'response', 'metadata']."""
    rows = {
        "image_path": ["china.jpg", "flower.jpg"] * 4,
        "query": ["What is it?"] * 8,
        "response": ["A pagoda.", "A dahlia."] * 4,
        "metadata": [{"id": number} for number in range(8)],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(walk.directory / "paths")
    columns = {"image_column": "image_path", "question_column": "query", "answer_column": "response"}
    arguments = [*hf_overrides("paths", media_root="media"), "--set", "train.output_dir=hf-paths"]
    for key, column in columns.items():
        arguments += ["--set", f"collator.dataset_columns.{key}={column}"]
    ended = process.run("vlm_dist.train", arguments, walk.directory, timeout_seconds=120)
    assert ended.exit_code == 0, ended.output
    assert len(walk.run.metrics("hf-paths")) == 2
    assert not read_quarantine(walk.directory / "hf-paths")


def test_the_guides_second_scenario_videos_alone(walk: Walk, process: Preloaded) -> None:
    rows = {
        "video_path": ["pan.mp4", "pan.avi"] * 4,
        "question": ["What moves?"] * 8,
        "answer": ["The camera."] * 8,
    }
    datasets.Dataset.from_dict(rows).save_to_disk(walk.directory / "videos")
    arguments = [*hf_overrides("videos", media_root="media"), "--set", "train.output_dir=hf-videos"]
    for override in (
        "data_processing.image_data=false",
        "data_processing.video_data=true",
        "dataset_columns.video_column=video_path",
        "video_processing.frame_extraction.num_frames=16",
    ):
        arguments += ["--set", f"collator.{override}"]
    ended = process.run("vlm_dist.train", arguments, walk.directory, timeout_seconds=120)
    assert ended.exit_code == 0, ended.output
    assert len(walk.run.metrics("hf-videos")) == 2
    assert not read_quarantine(walk.directory / "hf-videos")
