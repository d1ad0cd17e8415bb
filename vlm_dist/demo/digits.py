"""The demo's data: the 1,797 handwritten digits of scikit-learn as tar shards of pictures and of short clips.

    <directory>/images-train/   1,500 PNGs   "Which digit is this?"                  "7"
    <directory>/images-heldout/   297 PNGs
    <directory>/clips-train/      600 mp4s   "Which digits are shown, in order?"     "7 2"
    <directory>/clips-heldout/     96 mp4s   made of held-out digits only

The same seed gives the same split, the same clips and (with the same FFmpeg) the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from vlm_dist.data.shards.writer import ShardWriter

IMAGE_QUESTION = "Which digit is this?"
CLIP_QUESTION = "Which digits are shown, in order?"

NUM_HELDOUT_DIGITS = 297
SCALE = 7  # 8 x 8 -> 56 x 56 pixels: 4 x 4 patches of 14 pixels, merged to 2 x 2 visual tokens
DIGITS_PER_CLIP = 2
FRAMES_PER_DIGIT = 4
FRAMES_PER_SECOND = 8
MAX_INTENSITY = 16  # of scikit-learn's digits

Picture = NDArray[np.uint8]  # [56, 56, 3]


@dataclass(frozen=True)
class DigitSplit:
    """Pictures and labels of one side of the split."""

    pictures: list[Picture]
    labels: list[int]


@dataclass(frozen=True)
class DigitData:
    """What was written, for the demo's first lines."""

    directory: Path
    num_samples: dict[str, int]  # sub-directory -> samples
    num_bytes: int


def split_digits(seed: int = 0) -> tuple[DigitSplit, DigitSplit]:
    """Split the digits into training and held-out ones; no picture is on both sides."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    sides = order[NUM_HELDOUT_DIGITS:], order[:NUM_HELDOUT_DIGITS]
    train, heldout = (
        DigitSplit([enlarge(digits.images[i]) for i in side], [int(digits.target[i]) for i in side]) for side in sides
    )
    return train, heldout


def enlarge(digit: NDArray[np.float64]) -> Picture:
    """Turn intensities [8, 8] into an RGB picture [56, 56, 3], without smoothing."""
    grey = np.round(digit * 255 / MAX_INTENSITY).astype(np.uint8)
    return np.repeat(np.kron(grey, np.ones((SCALE, SCALE), np.uint8))[..., None], 3, axis=-1)


def encode_png(picture: Picture) -> bytes:
    """Encode one picture."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="PNG")
    return stream.getvalue()


def encode_clip(pictures: Sequence[Picture]) -> bytes:
    """Encode an h264 mp4 that shows one picture after the other, FRAMES_PER_DIGIT frames each."""
    import av  # of the extra vlm-dist[demo]; the rest of this module does without

    stream = io.BytesIO()
    with av.open(stream, mode="w", format="mp4") as container:
        video = container.add_stream("libx264", rate=Fraction(FRAMES_PER_SECOND), options={"crf": "18", "threads": "1"})
        video.height, video.width = pictures[0].shape[:2]
        video.pix_fmt = "yuv420p"
        for picture in pictures:
            for _ in range(FRAMES_PER_DIGIT):
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
    return stream.getvalue()


def build_digit_data(
    directory: Path, *, num_train_clips: int = 600, num_heldout_clips: int = 96, seed: int = 0
) -> DigitData:
    """Write the four sets as tar shards with their indexes and manifests, replacing earlier ones."""
    train, heldout = split_digits(seed)
    rng = np.random.default_rng(seed + 1)
    num_samples = {
        "images-train": _write_images(directory / "images-train", train),
        "images-heldout": _write_images(directory / "images-heldout", heldout),
        "clips-train": _write_clips(directory / "clips-train", train, num_train_clips, rng),
        "clips-heldout": _write_clips(directory / "clips-heldout", heldout, num_heldout_clips, rng),
    }
    num_bytes = sum(path.stat().st_size for path in directory.rglob("*.tar"))
    return DigitData(directory, num_samples, num_bytes)


def _write_images(directory: Path, split: DigitSplit) -> int:
    with ShardWriter(directory, prefix="digits", max_samples=500, overwrite=True) as writer:
        for number, (picture, label) in enumerate(zip(split.pictures, split.labels, strict=True)):
            writer.write(
                {
                    "__key__": f"digit-{number:05d}",
                    "png": encode_png(picture),
                    "json": _conversation(IMAGE_QUESTION, [label], absent="video"),
                }
            )
    return len(split.pictures)


def _write_clips(directory: Path, split: DigitSplit, num_clips: int, rng: np.random.Generator) -> int:
    with ShardWriter(directory, prefix="clips", max_samples=200, overwrite=True) as writer:
        for number in range(num_clips):
            chosen = rng.choice(len(split.pictures), size=DIGITS_PER_CLIP, replace=False)
            writer.write(
                {
                    "__key__": f"clip-{number:05d}",
                    "mp4": encode_clip([split.pictures[i] for i in chosen]),
                    "json": _conversation(CLIP_QUESTION, [split.labels[i] for i in chosen], absent="image"),
                }
            )
    return num_clips


def _conversation(question: str, labels: Sequence[int], absent: str) -> dict[str, str | None]:
    """A sample's JSON; the kind of media that it has not is null, so that all samples have the same columns."""
    return {"question": question, "answer": " ".join(str(label) for label in labels), absent: None}
