from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_run import TinyRun, make_tiny_run
from vlm_dist import build
from vlm_dist.config import RunConfig, load_run
from vlm_dist.data.types import IGNORE_INDEX, MicroBatch, MicroBatchJob, SampleRef, Source
from vlm_dist.demo.digits import encode_clip

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
#: Lets the tiny processor keep the size of a picture, which it else brings to 56 x 56 pixels.
ANY_SIZE = {"model.processor_params": {"min_pixels": 28 * 28, "max_pixels": 2**20}}


@dataclass
class Batch:
    """A micro-batch, and words for what is in it."""

    made: MicroBatch
    processor: Any

    @property
    def texts(self) -> list[str]:
        """Each row, special tokens included."""
        return [self.processor.tokenizer.decode(row) for row in self.made.inputs["input_ids"]]

    @property
    def learned(self) -> list[str]:
        """What carries loss in each row."""
        rows = zip(self.made.inputs["input_ids"], self.made.labels, strict=True)
        return [self.processor.tokenizer.decode(ids[labels != IGNORE_INDEX]) for ids, labels in rows]

    @property
    def skipped(self) -> list[str]:
        return [f"{slot.null_class}: {slot.message}" for slot in self.made.null_slots]

    def sizes(self, kind: str = "image") -> list[tuple[int, ...]]:
        """(width, height) in pixels of each image, with the number of frames before it for videos."""
        frames = 2 if kind == "video" else 1
        grid = self.made.inputs[f"{kind}_grid_thw"].tolist()
        return [(*((t * frames,) if kind == "video" else ()), w * 14, h * 14) for t, h, w in grid]

    def pixels(self, kind: str = "image") -> torch.Tensor:
        """[P, 2, 3]: mean colour of each patch, for the two frames that it joins, from 0 to 1."""
        values = self.made.inputs["pixel_values" if kind == "image" else "pixel_values_videos"]
        part = self.processor.image_processor
        mean, std = torch.tensor(part.image_mean), torch.tensor(part.image_std)
        return values.reshape(-1, 3, 2, 14 * 14).mean(-1).transpose(1, 2) * std + mean


@dataclass
class Project:
    """A working directory with a complete tiny run, and an empty directory for more data."""

    run: TinyRun
    data: Path

    def config(self, changes: Mapping[str, Any] | None = None) -> RunConfig:
        """The tiny run with some values changed."""
        return load_run(Path("configs/tiny.yaml"), [f"{key}={json.dumps(v)}" for key, v in (changes or {}).items()])

    def sources(self, changes: Mapping[str, Any] | None = None, which: str = "train") -> list[Source]:
        return build.open_sources_alone(self.config(changes), which)

    def processor(self, changes: Mapping[str, Any] | None = None) -> Any:
        return build.make_processor(self.config(changes))[0]

    def batch(self, changes: Mapping[str, Any] | None = None, samples: Sequence[int] = (0,), source: int = 0) -> Batch:
        """Make one micro-batch of a training source as a worker does."""
        config = self.config(changes)
        sources = build.open_sources_alone(config, "train")
        processor, family = build.make_processor(config)
        materialise = build.make_materialisers(config, sources, [], processor, family)
        refs = tuple(SampleRef(source, index) for index in samples)
        return Batch(materialise(MicroBatchJob(0, 0, refs, "train")), processor)

    def rows(self, *rows: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
        """Changes that make some records the training data; media lie in `data`."""
        path = self.data / f"{abs(hash(repr((rows, sorted(settings.items())))))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"data.train": [{"type": "jsonl", "path": str(path), "media_root": str(self.data), **settings}]}

    def picture(self, name: str, *stripes: tuple[int, int, int], size: tuple[int, int] = (56, 56)) -> str:
        """Draw upright stripes of equal width; returns the name."""
        image = Image.new("RGB", size)
        width = size[0] // len(stripes)
        for i, colour in enumerate(stripes):
            image.paste(colour, (i * width, 0, (i + 1) * width, size[1]))
        image.save(self.data / name)
        return name

    def clip(self, name: str, *greys: int) -> str:
        """Encode grey pictures of 56 x 56, each shown for half a second (4 frames); returns the name."""
        frames = [np.full((56, 56, 3), grey, dtype=np.uint8) for grey in greys]
        (self.data / name).write_bytes(encode_clip(frames))
        return name


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("effects"), num_images=20, num_clips=4)


@pytest.fixture
def project(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tiny_run.directory)
    return Project(tiny_run, tmp_path)
