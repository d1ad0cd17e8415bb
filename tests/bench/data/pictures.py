"""The pictures that all loaders read: made once, the same on every machine, kept under a git-ignored folder.

Crops of the two photographs that scikit-learn ships, enlarged, with a little noise, so that their JPEGs have the sizes
of real ones; each with a question and an answer. Our ShardWriter packs them into tar shards; every peer converts these
with its own tool.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

PICTURES_VERSION = 1
QUALITY = 90
_NOISE_SPARE = 256  # pixels by which the field of noise is larger than a picture
_WORDS = str.split(
    "a bridge over the river with trees and old houses behind it, two people on the stairs, clouds in the evening sky, "
    "red petals around a yellow heart, green leaves out of focus, drops of water on a stem, light from the left side"
)
_QUESTIONS = ("What is in the image?", "Describe this image.", "What is in the foreground?", "Which colours are there?")


@dataclass(frozen=True, slots=True)
class PictureSet:
    """One size of pictures.

    Attributes:
        name: of the folder.
        width: pixels.
        height: pixels.
        zoom: how much larger than needed the photograph is made before it is cropped.
        noise: of every channel, uniform within plus and minus so many levels.
        num_samples: of the set.
        samples_per_shard: of the tar shards.
    """

    name: str
    width: int
    height: int
    zoom: float
    noise: int
    num_samples: int
    samples_per_shard: int


#: About 57 KiB and about 240 KiB a sample.
FULL = (
    PictureSet("57k", 448, 448, 1.0, 4, num_samples=4096, samples_per_shard=256),
    PictureSet("240k", 1024, 768, 1.5, 12, num_samples=1536, samples_per_shard=96),
)
QUICK = (
    PictureSet("57k-quick", 448, 448, 1.0, 4, num_samples=192, samples_per_shard=48),
    PictureSet("240k-quick", 1024, 768, 1.5, 12, num_samples=96, samples_per_shard=24),
)


def make_pictures(folder: Path, pictures: PictureSet) -> Path:
    """Write a set's shards unless they are there already.

    Returns:
        The folder of the shards: `<folder>/<name>/tar`.
    """
    target = folder / pictures.name
    stamp = target / "made.json"
    made = json.dumps({"version": PICTURES_VERSION, **asdict(pictures)})
    if stamp.is_file() and stamp.read_text() == made:
        return target / "tar"
    from vlm_dist.data.shards.writer import ShardWriter

    shutil.rmtree(target, ignore_errors=True)
    with ShardWriter(target / "tar", prefix="train", max_samples=pictures.samples_per_shard) as writer:
        for sample in _samples(pictures):
            writer.write(sample)
    stamp.write_text(made)
    return target / "tar"


def _samples(pictures: PictureSet) -> Iterator[dict[str, Any]]:
    with ProcessPoolExecutor() as pool:
        jobs = ((pictures, number) for number in range(pictures.num_samples))
        for number, jpeg in enumerate(pool.map(_jpeg, jobs, chunksize=16)):
            random = np.random.default_rng([1, number])
            answer = " ".join(random.choice(_WORDS, size=int(random.integers(8, 33))))
            question = _QUESTIONS[int(random.integers(len(_QUESTIONS)))]
            yield {"__key__": f"{number:06d}", "jpg": jpeg, "json": {"question": question, "answer": answer}}


def _jpeg(job: tuple[PictureSet, int]) -> bytes:
    from PIL import Image

    pictures, number = job
    random = np.random.default_rng([0, number])
    photograph, noise = _material(pictures)[number % 2], _material(pictures)[2]
    left, top = (
        int(random.integers(0, have - want + 1))
        for have, want in ((photograph.shape[1], pictures.width), (photograph.shape[0], pictures.height))
    )
    shift = int(random.integers(0, _NOISE_SPARE)), int(random.integers(0, _NOISE_SPARE))
    pixels = (
        photograph[top : top + pictures.height, left : left + pictures.width]
        + (noise[shift[0] : shift[0] + pictures.height, shift[1] : shift[1] + pictures.width])
    )
    stream = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


@cache
def _material(pictures: PictureSet) -> tuple[Any, Any, Any]:
    """Both photographs, enlarged, and a field of noise that is larger than a picture: int16 [height, width, 3]."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = []
    for pixels in load_sample_images().images:
        height, width = pixels.shape[:2]
        factor = max(pictures.width / width, pictures.height / height) * pictures.zoom
        size = round(width * factor), round(height * factor)
        larger = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        photographs.append(np.asarray(larger).astype(np.int16))
    shape = (pictures.height + _NOISE_SPARE, pictures.width + _NOISE_SPARE, 3)
    noise = np.random.default_rng(2).integers(-pictures.noise, pictures.noise + 1, shape, dtype=np.int16)
    return photographs[0], photographs[1], noise


def texts() -> list[str]:
    """All words of the questions and answers, for a tokenizer that knows them."""
    return [" ".join(_WORDS), *_QUESTIONS]
