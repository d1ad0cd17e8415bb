"""Batch sizes and intervals in whole numbers.

The global batch belongs to the run: it is fixed at the first start and kept in the checkpoint. What changes with the
number of ranks is the accumulation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from vlm_dist.config.train import TrainConfig
from vlm_dist.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BatchArithmetic:
    """How a step's samples are cut.

    Attributes:
        global_batch_size: samples of one step, over all ranks.
        per_device: samples of one micro-batch.
        accumulation: micro-batches of one step on each rank.
        world_size: number of ranks.
        is_packed: the plan cuts steps into packs; the other sizes made the global batch, and do no more.
    """

    global_batch_size: int
    per_device: int
    accumulation: int
    world_size: int
    is_packed: bool = False

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one step that hold samples, over all ranks."""
        return self.global_batch_size // self.per_device

    @property
    def idle_share(self) -> float:
        """Share of the ranks' micro-batches that hold no sample; 0 where the world size divides them, and of packs."""
        if self.is_packed:
            return 0.0
        return 1 - self.num_micro_batches / (self.accumulation * self.world_size)

    def __str__(self) -> str:
        if self.is_packed and self.global_batch_size != self.per_device * self.accumulation * self.world_size:
            return f"global batch {self.global_batch_size}, in packs, over {self.world_size} ranks"
        idle = f" ({self.idle_share:.0%} of it empty)" if self.idle_share else ""
        return (
            f"global batch {self.global_batch_size} = {self.per_device} per device x {self.accumulation} accumulation "
            f"x {self.world_size} ranks{idle}"
        )


def resolve_batch(
    train: TrainConfig, world_size: int, global_batch_size: int | None = None, *, allow_idle: bool = False
) -> BatchArithmetic:
    """Fit the batch of a run to today's number of ranks.

    Args:
        train: per_device_train_batch_size and gradient_accumulation_steps; the latter counts at the first start only.
        world_size: number of ranks.
        global_batch_size: of the run, when it has one already (resume); accumulation follows from it.
        allow_idle: accept a world size that does not divide the micro-batches of a step; some ranks then get empty
            ones (`idle_share`).

    Raises:
        ConfigError: the sizes do not fit; the message names the nearest that do.
    """
    per_device = train.per_device_train_batch_size
    if global_batch_size is None:
        accumulation = train.gradient_accumulation_steps
        global_batch_size = per_device * accumulation * world_size
        return BatchArithmetic(global_batch_size, per_device, accumulation, world_size, train.packing)
    slots = per_device * world_size
    if train.packing:
        return BatchArithmetic(global_batch_size, per_device, math.ceil(global_batch_size / slots), world_size, True)
    if global_batch_size % per_device:
        fits = [size for size in range(1, global_batch_size + 1) if global_batch_size % size == 0]
        nearest = " or ".join(str(size) for size in sorted(sorted(fits, key=lambda size: abs(size - per_device))[:2]))
        raise ConfigError(
            f"the checkpoint's global batch of {global_batch_size} samples, which stays the run's, is not a multiple "
            f"of {per_device} (per_device_train_batch_size); nearest: {_nearest(global_batch_size, per_device)}; or "
            f"set per_device_train_batch_size to {nearest}"
        )
    if global_batch_size % slots and not allow_idle:
        raise ConfigError(
            f"the checkpoint's global batch of {global_batch_size} samples is not a multiple of {per_device} x "
            f"{world_size} (per_device_train_batch_size x world size); nearest: {_nearest(global_batch_size, slots)}"
        )
    return BatchArithmetic(global_batch_size, per_device, math.ceil(global_batch_size / slots), world_size)


def resolve_interval(value: float, total_steps: int) -> int:
    """An interval in steps.

    Args:
        value: 0 is never; below 1 a share of all steps (rounded up, at least one step); from 1 on, steps.
        total_steps: optimizer updates of the whole run.
    """
    if value >= 1:
        return int(value)
    # Exact: in floats 0.1 x 30 is a little above 3, and would be rounded up to 4.
    return math.ceil(Fraction(str(value)) * total_steps)


def _nearest(number: int, divisor: int) -> str:
    """The multiples of `divisor` on both sides of `number`; never 0."""
    below = number // divisor * divisor
    return f"{below}, {below + divisor}" if below else str(divisor)
