"""The samples that all of a benchmark's runs read: pictures, texts and clips of the benchmark's lengths.

Crops of scikit-learn's two photographs, of such a size that a picture has 256 visual tokens for each tile that the
length file gives it, and words of a tokenizer that knows them. Ours reads tar shards of them, the peers a data set.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.bench.data.pictures import _WORDS, QUALITY
from tests.bench.lengths import draw
from vlm_dist.data.shards.writer import ShardWriter

TOKEN_SIDE = 28  # pixels of the square that becomes one visual token
#: Tiles of the length file -> visual tokens across and down: 256 for each tile.
GRIDS = {1: (16, 16), 3: (32, 24), 4: (32, 32), 5: (40, 32)}
ANSWER_SHARE = 0.3  # of a sample's text
CLIP_SECONDS, CLIP_RATE, CLIP_WORDS = 4, 8, 96


@dataclass(frozen=True)
class Scale:
    """How large samples are.

    Attributes:
        divisor: of the visual tokens along each side, and of the words.
        num_samples: pictures and texts.
        num_clips: clips.
        clip_grid: visual tokens of a frame, across and down.
        num_frames: that are taken from a clip.
    """

    divisor: int
    num_samples: int
    num_clips: int
    clip_grid: tuple[int, int]
    num_frames: int


TRUE = Scale(divisor=1, num_samples=384, num_clips=24, clip_grid=(16, 16), num_frames=16)
TINY = Scale(divisor=8, num_samples=24, num_clips=4, clip_grid=(2, 2), num_frames=4)


@dataclass(frozen=True)
class Sample:
    """One sample; of its picture or clip the file's bytes."""

    question: str
    answer: str
    jpeg: bytes | None = None
    mp4: bytes | None = None


def make_samples(scale: Scale, seed: int = 0) -> list[Sample]:
    """Pictures and texts in equal parts, with the lengths of the mix."""
    tokens, tiles = draw("mix", scale.num_samples, seed)
    words = np.where(tiles > 0, tokens - tiles * 256, tokens) // scale.divisor
    sizes = [tuple(side // scale.divisor * TOKEN_SIDE for side in GRIDS[count]) if count else None for count in tiles]
    photographs = _photographs()
    with ThreadPoolExecutor() as pool:
        jpegs = list(pool.map(lambda job: _jpeg(photographs, *job), enumerate(sizes)))
    return [
        Sample(*_text(number, int(count)), jpeg) for number, (count, jpeg) in enumerate(zip(words, jpegs, strict=True))
    ]


def make_clips(scale: Scale) -> list[Sample]:
    """Clips with a window that moves over a photograph, in H.263's successor MPEG-4, which every reader opens."""
    photographs = _photographs()
    found = []
    for number in range(scale.num_clips):
        width, height = (side * TOKEN_SIDE for side in scale.clip_grid)
        frames = _moving(photographs[number % 2], width, height, CLIP_SECONDS * CLIP_RATE, number)
        found.append(Sample(*_text(10_000 + number, CLIP_WORDS // scale.divisor), mp4=encode_clip(frames)))
    return found


def write_shards(directory: Path, samples: list[Sample]) -> Path:
    """For our trainer."""
    with ShardWriter(directory, prefix="train", max_samples=64) as writer:
        for number, sample in enumerate(samples):
            fields: dict[str, Any] = {"question": sample.question, "answer": sample.answer}
            media: dict[str, Any] = {}
            if sample.jpeg is not None:
                media["jpg"] = sample.jpeg
            elif sample.mp4 is not None:
                media["mp4"] = sample.mp4
            missing = {"image": None} if sample.jpeg is None else {}
            writer.write({"__key__": f"{number:06d}", **media, "json": fields | missing})
    return directory


def write_rows(directory: Path, samples: list[Sample]) -> Path:
    """For the peers: one line a sample, pictures in files."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, sample in enumerate(samples):
        picture = None
        if sample.jpeg is not None:
            picture = f"{number:06d}.jpg"
            (directory / picture).write_bytes(sample.jpeg)
        lines.append(json.dumps({"question": sample.question, "answer": sample.answer, "image": picture}))
    (directory / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def encode_clip(frames: list[np.ndarray]) -> bytes:
    """An mp4 of frames [height, width, 3]; OpenCV's encoder, which GPU machines tend to have."""
    import tempfile

    import cv2

    height, width = frames[0].shape[:2]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), CLIP_RATE, (width, height))
        assert writer.isOpened(), "OpenCV has no encoder for MPEG-4"
        for frame in frames:
            writer.write(np.ascontiguousarray(frame[:, :, ::-1]))
        writer.release()
        return path.read_bytes()


def _text(number: int, num_words: int) -> tuple[str, str]:
    """Question and answer with so many words together, one of each at least."""
    random = np.random.default_rng([1, number])
    words = [str(word) for word in random.choice(_WORDS, size=max(2, num_words))]
    cut = max(1, round(len(words) * (1 - ANSWER_SHARE)))
    cut = min(cut, len(words) - 1)
    return " ".join(words[:cut]), " ".join(words[cut:])


def _photographs() -> list[np.ndarray]:
    """uint8 [height, width, 3], large enough for every crop."""
    from sklearn.datasets import load_sample_images

    width, height = (side * TOKEN_SIDE for side in GRIDS[5])
    found = []
    for pixels in load_sample_images().images:
        factor = 1.25 * max(width / pixels.shape[1], height / pixels.shape[0])
        size = round(pixels.shape[1] * factor), round(pixels.shape[0] * factor)
        found.append(np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)))
    return found


def _jpeg(photographs: list[np.ndarray], number: int, size: tuple[int, int] | None) -> bytes | None:
    if size is None:
        return None
    random = np.random.default_rng([0, number])
    photograph = photographs[number % 2]
    left, top = (
        int(random.integers(0, photograph.shape[axis] - side + 1)) for axis, side in ((1, size[0]), (0, size[1]))
    )
    stream = io.BytesIO()
    Image.fromarray(photograph[top : top + size[1], left : left + size[0]]).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def _moving(photograph: np.ndarray, width: int, height: int, count: int, seed: int) -> list[np.ndarray]:
    return list(_windows(photograph, width, height, count, np.random.default_rng([2, seed])))


def _windows(
    photograph: np.ndarray, width: int, height: int, count: int, random: np.random.Generator
) -> Iterator[np.ndarray]:
    top = int(random.integers(0, photograph.shape[0] - height + 1))
    lefts = np.linspace(0, photograph.shape[1] - width, count).astype(int)
    for left in lefts:
        yield photograph[top : top + height, left : left + width]
