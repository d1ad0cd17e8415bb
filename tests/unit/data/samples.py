"""Pictures, clips, and a source of them in memory, for the materialise side of the data room."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np
from PIL import Image

from vlm_dist.config.vlm_collator import VlmCollatorConfig
from vlm_dist.data.index.facts import FACTS_DTYPE
from vlm_dist.data.types import RawSample, SampleOrigin
from vlm_dist.errors import SkipSample


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def jpeg(width: int = 64, height: int = 48, seed: int = 0, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(noise(width, height, seed)).save(stream, "JPEG", **options)
    return stream.getvalue()


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def mp4(num_frames: int = 8, fps: int = 4, width: int = 64, height: int = 48) -> bytes:
    """Each frame is grey, of a level that tells its number: 10 + 8 x number, modulo 256."""
    stream = io.BytesIO()
    with av.open(stream, mode="w", format="mp4") as container:
        video = container.add_stream("libx264", rate=fps, options={"crf": "10", "threads": "1", "g": "4"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        for number in range(num_frames):
            picture = np.full((height, width, 3), (10 + 8 * number) % 256, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
    return stream.getvalue()


@dataclass
class MemorySource:
    """Rows in memory; the row None is damaged, a row that is an exception is raised when it is read."""

    rows: Sequence[Any]
    name: str = "memory"
    names: tuple[str, ...] = field(default=("image", "video", "question", "answer"))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> tuple[str, ...]:
        return self.names

    @property
    def manifest_hash(self) -> str:
        return f"{self.name}-{len(self.rows)}"

    @property
    def shard_sizes(self) -> Sequence[int]:
        return [len(self.rows)]

    def facts(self, rows: np.ndarray) -> np.ndarray:
        return np.zeros(len(rows), dtype=FACTS_DTYPE)

    def origin(self, index: int) -> SampleOrigin:
        return SampleOrigin(self.name, "shard", str(index))

    def read(self, index: int) -> RawSample:
        row = self.rows[index]
        if row is None:
            raise SkipSample("bad_sample", "a member is missing")
        if isinstance(row, Exception):
            raise row
        return RawSample(row, self.origin(index))


def collator(**sections: Any) -> VlmCollatorConfig:
    """A collator config: the defaults, with some keys of some sections set."""
    return VlmCollatorConfig.model_validate(sections)
