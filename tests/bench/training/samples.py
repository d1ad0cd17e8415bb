"""The samples of all trainers: real photographs in the sizes that the mix of lengths implies, questions and answers.

Kept under a git-ignored folder: `images/*.jpg` and `rows.jsonl` for the peers, `tar/` for us, `model/` for all. Lengths
are those of `tests/bench/lengths.py`, divided by `SCALE`, so that a step on two CPU cores takes about a second.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.data.pictures import texts
from tests.bench.lengths import TOKENS_PER_TILE, draw

SAMPLES_VERSION = 1
SCALE = 2
_PIXELS_PER_TOKEN = 28 * 28  # of a merged token of Qwen2-VL
_OVERHEAD_TOKENS = 24  # of the chat template
_ANSWER_SHARE = 0.3
_WORDS = texts()[0].replace(",", "").split()


@dataclass(frozen=True)
class SampleSet:
    """Samples of one mix.

    Attributes:
        name: of the folder.
        mix: one of `lengths.MIXES`; "equal": all pictures and texts of one size; "text": a few words.
        num_samples: of the set.
        max_tokens: longer ones are taken as long as this.
    """

    name: str
    mix: str
    num_samples: int
    max_tokens: int = 2048


MIX = SampleSet("mix", "mix", 512)
EQUAL = SampleSet("equal", "equal", 256)
MANY = 100_000


def make_samples(folder: Path, samples: SampleSet) -> Path:
    """Write a set unless it is there already.

    Returns:
        Its folder.
    """
    target = folder / samples.name
    stamp = target / "made.json"
    made = json.dumps({"version": SAMPLES_VERSION, **asdict(samples)})
    if stamp.is_file() and stamp.read_text() == made:
        return target
    from vlm_dist.data.shards.writer import ShardWriter

    shutil.rmtree(target, ignore_errors=True)
    (target / "images").mkdir(parents=True)
    processor = make_model(target / "model")
    rng = np.random.default_rng(0)
    rows = []
    with ShardWriter(target / "tar", prefix="train", max_samples=64) as writer:
        for number, (tokens, tiles) in enumerate(zip(*_sizes(samples), strict=True)):
            row, jpeg = _sample(number, int(tokens), int(tiles), rng)
            row["tokens"] = _count(processor, row, jpeg)
            rows.append(row)
            text = {"question": row["question"], "answer": row["answer"]}
            writer.write({"__key__": f"{number:06d}", "json": text, **({"jpg": jpeg} if jpeg else {})})
            if jpeg:
                (target / row["image"]).write_bytes(jpeg)
    (target / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stamp.write_text(made)
    return target


def make_many(folder: Path, data: Path) -> Path:
    """Write rows that name the samples of a set again and again, `MANY` in all, unless they are there already.

    Args:
        folder: gets a folder with `rows.jsonl` and the set's images.
        data: of the set.
    """
    target = folder / "many"
    if not (target / "rows.jsonl").is_file():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(data / "images", target / "images", copy_function=os.link)
        rows = (data / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        unfinished = target / "unfinished"
        with unfinished.open("w", encoding="utf-8") as lines:
            lines.writelines(rows[i % len(rows)] for i in range(MANY))
        unfinished.rename(target / "rows.jsonl")
    return target


def _sizes(samples: SampleSet) -> tuple[Any, Any]:
    if samples.mix == "equal":
        return np.full(samples.num_samples, 512), np.ones(samples.num_samples, dtype=np.int64)
    if samples.mix == "text":
        return np.full(samples.num_samples, 32), np.zeros(samples.num_samples, dtype=np.int64)
    tokens, tiles = draw(samples.mix, samples.num_samples, seed=1)
    return np.minimum(tokens // SCALE, samples.max_tokens), tiles


def _sample(number: int, tokens: int, tiles: int, rng: Any) -> tuple[dict[str, Any], bytes | None]:
    visual = tiles * TOKENS_PER_TILE // SCALE
    num_words = max(8, tokens - visual - _OVERHEAD_TOKENS)
    num_answer = max(4, int(num_words * _ANSWER_SHARE))
    words = [_WORDS[i] for i in rng.integers(0, len(_WORDS), num_words)]
    jpeg = _jpeg(number, visual * _PIXELS_PER_TOKEN, rng) if tiles else None
    image = f"images/{number:06d}.jpg" if jpeg else None
    return {"image": image, "question": " ".join(words[num_answer:]), "answer": " ".join(words[:num_answer])}, jpeg


def _jpeg(number: int, num_pixels: int, rng: Any) -> bytes:
    """A crop of a real photograph with about so many pixels, of a random shape; sides are multiples of 28."""
    from PIL import Image

    aspect = float(np.exp(rng.uniform(-0.4, 0.4)))
    width = max(2, round((num_pixels * aspect) ** 0.5 / 28)) * 28
    height = max(2, round((num_pixels / aspect) ** 0.5 / 28)) * 28
    photograph = _photographs()[number % 2]
    share = float(rng.uniform(0.6, 1.0))
    crop_w, crop_h = int(photograph.width * share), int(photograph.height * share)
    left, top = (int(rng.integers(0, spare + 1)) for spare in (photograph.width - crop_w, photograph.height - crop_h))
    picture = photograph.crop((left, top, left + crop_w, top + crop_h)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=90)
    return stream.getvalue()


@cache
def _photographs() -> tuple[Any, ...]:
    from PIL import Image
    from sklearn.datasets import load_sample_images

    return tuple(Image.fromarray(pixels) for pixels in load_sample_images().images)


def make_model(folder: Path) -> Any:
    """Write a Qwen2-VL whose head has the share of the language model's work that it has in Qwen2-VL-2B.

    Returns:
        Its processor.
    """
    import torch

    from vlm_dist.demo.tiny_model import (
        DEFAULT_CORPUS,
        TinyShape,
        build_config,
        build_model,
        build_processor,
        build_tokenizer,
        save_checkpoint,
    )

    shape = TinyShape(
        hidden_size=192,
        intermediate_size=768,
        num_layers=4,
        num_heads=6,
        num_key_value_heads=2,
        vision_dim=96,
        vision_depth=3,
        vision_heads=6,
        min_pixels=56 * 56,
        max_pixels=1 << 24,
        max_position_embeddings=8192,
    )
    tokenizer = build_tokenizer([*DEFAULT_CORPUS, *texts()], 1600)
    processor = build_processor(shape, tokenizer)
    save_checkpoint(folder, build_model(build_config(shape, tokenizer)), processor, torch.float32)
    return processor


def _count(processor: Any, row: dict[str, Any], jpeg: bytes | None) -> int:
    """Tokens of a sample as Qwen2-VL's processor makes them."""
    from PIL import Image

    content: list[dict[str, Any]] = [{"type": "text", "text": row["question"]}]
    images = None
    if jpeg:
        content.insert(0, {"type": "image"})
        images = [Image.open(io.BytesIO(jpeg))]
    answer = [{"type": "text", "text": row["answer"]}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    )
    return len(processor(text=[text], images=images)["input_ids"][0])
