"""Data sets of Hugging Face's library, saved on disk, with pictures, paths and clips."""

from __future__ import annotations

import json

import datasets
import pytest
from PIL import Image

from tests.e2e.media import CHINA, FLOWER, write_media
from tests.e2e.preloaded import Preloaded
from tests.tiny_run import TinyRun
from vlm_dist.data.quarantine import read_quarantine

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def run(empty_run: TinyRun) -> TinyRun:
    write_media(empty_run.directory / "media")
    return empty_run


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


def test_a_saved_data_set_with_an_image_feature(run: TinyRun, process: Preloaded) -> None:
    """Columns image, question, answer are the guide's: only the data set is named."""
    rows = {
        "image": [Image.fromarray(CHINA[::4, ::4]), Image.fromarray(FLOWER[::4, ::4])] * 4,
        "question": ["What is it?"] * 8,
        "answer": ["A pagoda.", "A dahlia."] * 4,
    }
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data.save_to_disk(run.directory / "vqa")
    arguments = [*hf_overrides("vqa"), "--set", "train.output_dir=hf-image"]
    ended = process.run("vlm_dist.train", arguments, run.directory, timeout_seconds=120)
    assert ended.exit_code == 0, ended.output
    assert len(run.metrics("hf-image")) == 2
    assert not read_quarantine(run.directory / "hf-image")
    # and the same directory as a DatasetDict, whose only split is found by itself
    datasets.DatasetDict({"train": data}).save_to_disk(run.directory / "vqa-splits")
    arguments = [*hf_overrides("vqa-splits"), "--set", "train.output_dir=hf-split"]
    again = process.run("vlm_dist.train", arguments, run.directory, timeout_seconds=120)
    assert again.exit_code == 0, again.output
    assert run.losses("hf-split") == run.losses("hf-image")


def test_a_data_set_with_paths_and_columns_of_its_own(run: TinyRun, process: Preloaded) -> None:
    """The guide's first scenario: ['image_path', 'query', 'response', 'metadata']."""
    rows = {
        "image_path": ["china.jpg", "flower.jpg"] * 4,
        "query": ["What is it?"] * 8,
        "response": ["A pagoda.", "A dahlia."] * 4,
        "metadata": [{"id": number} for number in range(8)],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(run.directory / "paths")
    columns = {"image_column": "image_path", "question_column": "query", "answer_column": "response"}
    arguments = [*hf_overrides("paths", media_root="media"), "--set", "train.output_dir=hf-paths"]
    for key, column in columns.items():
        arguments += ["--set", f"collator.dataset_columns.{key}={column}"]
    ended = process.run("vlm_dist.train", arguments, run.directory, timeout_seconds=120)
    assert ended.exit_code == 0, ended.output
    assert len(run.metrics("hf-paths")) == 2
    assert not read_quarantine(run.directory / "hf-paths")


def test_the_guides_second_scenario_videos_alone(run: TinyRun, process: Preloaded) -> None:
    rows = {
        "video_path": ["pan.mp4", "pan.avi"] * 4,
        "question": ["What moves?"] * 8,
        "answer": ["The camera."] * 8,
    }
    datasets.Dataset.from_dict(rows).save_to_disk(run.directory / "videos")
    arguments = [*hf_overrides("videos", media_root="media"), "--set", "train.output_dir=hf-videos"]
    for override in (
        "data_processing.image_data=false",
        "data_processing.video_data=true",
        "dataset_columns.video_column=video_path",
        "video_processing.frame_extraction.num_frames=16",
    ):
        arguments += ["--set", f"collator.{override}"]
    ended = process.run("vlm_dist.train", arguments, run.directory, timeout_seconds=120)
    assert ended.exit_code == 0, ended.output
    assert len(run.metrics("hf-videos")) == 2
    assert not read_quarantine(run.directory / "hf-videos")
