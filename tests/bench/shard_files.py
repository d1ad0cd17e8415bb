"""Shards without content, with real indexes: what the planner reads of a large data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vlm_dist.data.index.facts import FACTS_DTYPE
from vlm_dist.data.index.manifest import Manifest, ShardEntry
from vlm_dist.data.index.open_index import stamp_of
from vlm_dist.data.index.shard_index import ShardIndex, sidecar_paths, write_index
from vlm_dist.data.plan.order import EpochOrder
from vlm_dist.data.plan.plan import Plan

SAMPLE_BYTES = 240 * 1024
MEMBERS, JSON_FIELDS = ("jpg", "json"), ("answer", "question")


def rows_planned_with(plan: Plan, step: int) -> NDArray[np.int64]:
    """Rows of the window that a step of the first epoch is planned in; the plan has one source."""
    order = EpochOrder(plan._shapes, plan.settings.seed, 0, plan.num_groups, True)
    window = plan._window_of(step)
    first, stop = (plan._first_step(one) * plan.settings.global_batch_size for one in (window, window + 1))
    return order.window(first, min(stop, plan.num_epoch_samples)).row


def make_shards(folder: Path, num_shards: int, shard_samples: int, rows: NDArray[np.int64]) -> int:
    """Make shards, their manifest, and the indexes of those that have some of these rows; may be called again.

    Returns:
        How many have an index.
    """
    wanted = set(np.unique(rows // shard_samples).tolist())
    entries = []
    for number in range(num_shards):
        shard = folder / f"{number:06d}.tar"
        sidecar = sidecar_paths(shard, None)[0]
        if not shard.exists():
            with shard.open("wb") as file:
                file.truncate(shard_samples * SAMPLE_BYTES)
            sidecar.touch()
        stamp = stamp_of(shard.stat())
        if number in wanted:
            index = _index(number, shard_samples, stamp)
            write_index(index, sidecar)
            entries.append(ShardEntry.of(shard.name, index))
        else:
            size, digest = shard_samples * SAMPLE_BYTES, f"{number:032x}"
            entries.append(ShardEntry(shard.name, shard_samples, size, digest, MEMBERS, JSON_FIELDS, ("image",), stamp))
    Manifest(tuple(entries)).write(folder)
    return len(wanted)


def _index(number: int, num_samples: int, stamp: str) -> ShardIndex:
    rng = np.random.default_rng(number)
    starts = np.arange(num_samples, dtype=np.int64) * SAMPLE_BYTES
    facts = np.zeros(num_samples, dtype=FACTS_DTYPE)
    facts["num_images"] = 1
    facts["image_width"] = facts["image_height"] = rng.integers(200, 1400, num_samples)
    facts["image_pixels"] = facts["image_width"].astype(np.int64) ** 2
    facts["text_bytes"] = np.exp(rng.normal(5.6, 0.9, num_samples))
    return ShardIndex(
        pa.array([f"{number:06d}{row:06d}" for row in range(num_samples)]),
        dict.fromkeys(MEMBERS, starts + 512),
        dict.fromkeys(MEMBERS, np.full(num_samples, 1000)),
        facts,
        JSON_FIELDS,
        num_samples * SAMPLE_BYTES,
        stamp=stamp,
        checks=np.zeros(num_samples, dtype=np.uint32),
    )
