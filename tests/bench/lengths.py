"""Three mixes of sample lengths, for benchmarks of batching.

`images` is 70,706 samples of visual question answering (AI2D, ChartQA, DocVQA, SynthDoG) as InternVL's tokenizer and
its tiles of 448 pixels see them, from the data lists of ModelTC/OmniBal: `lengths.csv` has the quantiles of their
tokens (text and visual) for each number of tiles. `mix` adds as many texts, and `heavy tail` 2% of videos to that.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.index.facts import FACTS_DTYPE
from vlm_dist.data.lengths import Costs
from vlm_dist.data.plan.hashing import hash_rows, hash_words

MIXES = ("images", "mix", "heavy tail")

TEXT_LOG_MEAN, TEXT_LOG_SIGMA, TEXT_MIN, TEXT_MAX = 5.6, 0.9, 32, 8192  # tokens
VIDEO_SHARE, VIDEO_MIN, VIDEO_MAX = 0.02, 4096, 16_384  # tokens
TOKENS_PER_TILE = 256  # of a video's frames, as of pictures


def draw(mix: str, num_samples: int, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw samples.

    Args:
        mix: one of `MIXES`.
        num_samples: N.
        seed: of the draw.

    Returns:
        tokens, text and visual, and tiles for the vision tower: two int64 [N].
    """
    rng = np.random.default_rng(seed)
    kind = np.zeros(num_samples, dtype=np.int64)  # 0 picture, 1 text, 2 video
    if mix != "images":
        kind = (rng.random(num_samples) < 0.5).astype(np.int64)
    if mix == "heavy tail":
        kind[rng.random(num_samples) < VIDEO_SHARE] = 2
    tokens, tiles = _pictures(rng.random(num_samples), rng.random(num_samples))
    texts = np.exp(rng.normal(TEXT_LOG_MEAN, TEXT_LOG_SIGMA, num_samples))
    videos = rng.integers(VIDEO_MIN, VIDEO_MAX + 1, num_samples)
    tokens = np.select([kind == 1, kind == 2], [np.clip(texts, TEXT_MIN, TEXT_MAX).astype(np.int64), videos], tokens)
    tiles = np.select([kind == 1, kind == 2], [np.zeros_like(tiles), -(-videos // TOKENS_PER_TILE)], tiles)
    return tokens, tiles


def _pictures(which: NDArray[np.float64], quantile: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Turn two uniform numbers per sample into tokens and tiles."""
    table: dict[int, tuple[int, list[tuple[float, int]]]] = {}
    with (Path(__file__).with_name("lengths.csv")).open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            points = table.setdefault(int(row["tiles"]), (int(row["num_samples"]), []))[1]
            points.append((float(row["quantile"]), int(row["tokens"])))
    counts = np.cumsum([count for count, _ in table.values()])
    chosen = np.searchsorted(counts / counts[-1], which, side="right")
    tokens, tiles = np.zeros(len(which), dtype=np.int64), np.zeros(len(which), dtype=np.int64)
    for number, (num_tiles, (_, points)) in enumerate(table.items()):
        mine = chosen == number
        tokens[mine] = np.interp(quantile[mine], *zip(*points, strict=True)).round().astype(np.int64)
        tiles[mine] = num_tiles
    return tokens, tiles


class MixLengths:
    """A length model that knows the costs of every row: those of a pool of drawn samples, picked by a hash.

    Args:
        mix: one of `MIXES`.
        num_pool: samples that are drawn; rows beyond take one of them each.
        seed: of the draw.
    """

    mixes_all = True

    def __init__(self, mix: str, num_pool: int = 1 << 18, seed: int = 0) -> None:
        self.digest = f"{mix}-{num_pool}-{seed}"
        self._tokens, self._tiles = draw(mix, num_pool, seed)
        self._state = hash_words(seed)

    def costs(self, source: int, rows: NDArray[np.int64]) -> Costs:
        """Look the costs of some rows up."""
        place = (hash_rows(self._state, np.asarray(rows)) % np.uint64(len(self._tokens))).astype(np.int64)
        return Costs(self._tokens[place], self._tiles[place], np.zeros(len(place), dtype=np.int64))


class SizedSource:
    """Shards without data.

    Args:
        shard_sizes: samples of each.
        name: of the source.
    """

    columns = ("image", "question", "answer")

    def __init__(self, shard_sizes: Sequence[int], name: str = "synthetic") -> None:
        self.name = name
        self.shard_sizes = shard_sizes
        self.manifest_hash = f"{name}/{len(shard_sizes)}/{sum(shard_sizes)}"

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def facts(self, rows: NDArray[np.int64]) -> NDArray[np.void]:
        """Nothing is known."""
        return np.zeros(len(rows), dtype=FACTS_DTYPE)
