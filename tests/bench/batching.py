"""Padding and balance of the three ways to make micro-batches, on the three mixes of lengths."""

from __future__ import annotations

from typing import Literal

from tests.bench.lengths import MixLengths, SizedSource
from vlm_dist.data.plan.measure import PlanFigures, measure
from vlm_dist.data.plan.plan import Plan, PlanSettings
from vlm_dist.data.types import Layout, PackBudget

Mode = Literal["padding", "group_by_length", "packing"]

MODES: tuple[Mode, ...] = ("padding", "group_by_length", "packing")
PER_DEVICE, ACCUMULATION = 8, 4
#: As many tokens as the longest video: a shorter pack could not hold it.
PACK = PackBudget(16_384)
NUM_SAMPLES, SHARD_SAMPLES = 2_000_000, 10_000


def measure_batching(
    mix: str, mode: Mode, world_size: int, accumulation: int = ACCUMULATION, num_samples: int = 131_072
) -> PlanFigures:
    """Plan steps of 8 samples per device x accumulation x ranks, and add up what they cost.

    Args:
        mix: one of `lengths.MIXES`.
        mode: of the plan.
        world_size: ranks.
        accumulation: micro-batches of 8 per rank and step; packs have as many samples in all.
        num_samples: that are measured: the first steps of the first epoch.
    """
    source = SizedSource([SHARD_SAMPLES] * (NUM_SAMPLES // SHARD_SAMPLES))
    batch = PER_DEVICE * accumulation * world_size
    settings = PlanSettings(batch, PER_DEVICE, mode, pack=PACK)
    plan = Plan([source], [1.0], settings, MixLengths(mix), Layout(world_size))
    return measure(plan, (plan.step(index) for index in range(max(num_samples // batch, 32))), world_size)
