"""Steps of many ranks, cut by our planner or by the samplers of Hugging Face's Trainer, and what they compute."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.trainer_pt_utils import BatchRebalanceSampler, get_length_grouped_indices

from tests.bench.lengths import MixLengths, SizedSource
from vlm_dist.data.plan.plan import Mode, Plan, PlanSettings
from vlm_dist.data.types import Layout, PackBudget

# Shapes: W ranks, M micro-batches of each rank in a step, N samples

#: As many tokens as the longest video: a shorter pack could not hold it.
PACK = PackBudget(16_384)
SHARD_SAMPLES = 10_000

#: A step: M rows of W micro-batches, each the samples (positions in N) that it has.
Rows = list[list[Sequence[int]]]


@dataclass(frozen=True)
class Setting:
    """How large a step is.

    Attributes:
        world_size: W.
        per_device: samples of a micro-batch.
        accumulation: micro-batches of a rank in a step; packs are as many as the plan makes.
    """

    world_size: int
    per_device: int
    accumulation: int

    @property
    def batch(self) -> int:
        """Samples of a step."""
        return self.world_size * self.per_device * self.accumulation

    def __str__(self) -> str:
        return f"{self.per_device} x {self.accumulation}"


@dataclass(frozen=True)
class StepCosts:
    """What a step costs; [M, W] each.

    Attributes:
        useful: tokens of the samples.
        computed: tokens with padding.
        squares: sum over rows of the squares of what attention computes: each row with padding, each sample of a pack.
        tiles: pictures of 448 x 448 pixels for the vision tower.
        useful_squares: sum over all samples of the squares of their lengths; one number.
    """

    useful: NDArray[np.float64]
    computed: NDArray[np.float64]
    squares: NDArray[np.float64]
    tiles: NDArray[np.float64]
    useful_squares: float


def step_costs(rows: Rows, tokens: NDArray[np.int64], tiles: NDArray[np.int64], *, is_packed: bool) -> StepCosts:
    """Add up one step.

    Args:
        rows: of the step.
        tokens: of each sample, [N].
        tiles: of each sample, [N].
        is_packed: nothing is padded, and samples do not see each other.
    """
    shape = (len(rows), len(rows[0]))
    useful, computed, squares, seen = (np.zeros(shape) for _ in range(4))
    useful_squares = 0.0
    for m, row in enumerate(rows):
        for rank, samples in enumerate(row):
            if not len(samples):
                continue
            lengths = tokens[np.asarray(samples)].astype(np.float64)
            useful[m, rank] = lengths.sum()
            computed[m, rank] = lengths.sum() if is_packed else lengths.max() * len(lengths)
            squares[m, rank] = (lengths**2).sum() if is_packed else lengths.max() ** 2 * len(lengths)
            useful_squares += float((lengths**2).sum())
            seen[m, rank] = tiles[np.asarray(samples)].sum()
    return StepCosts(useful, computed, squares, seen, useful_squares)


class OurSteps:
    """Steps of our planner.

    Args:
        mode: of the plan.
        mix: that the lengths are of.
        setting: of the steps.
        num_samples: of an epoch.
    """

    def __init__(self, mode: Mode, mix: MixLengths, setting: Setting, num_samples: int) -> None:
        self._width = setting.world_size
        source = SizedSource([SHARD_SAMPLES] * -(-num_samples // SHARD_SAMPLES))
        settings = PlanSettings(setting.batch, setting.per_device, mode, pack=PACK)
        self._plan = Plan([source], [1.0], settings, mix, Layout(self._width))

    def __iter__(self) -> Iterator[Rows]:
        for index in range(self._plan.steps_per_epoch - 1):  # the last has fewer samples
            step = self._plan.step(index)
            by_rank = [step.for_rank(rank, self._width) for rank in range(self._width)]
            yield [
                [[ref.index for ref in job.refs if ref is not None] for job in row]
                for row in zip(*by_rank, strict=True)
            ]


class TrainerSteps:
    """Steps of Hugging Face's Trainer, made by its own code, and dealt to the ranks as accelerate does.

    Args:
        strategy: "random", "group_by_length" or "batch_rebalance"; a value of `train_sampling_strategy`.
        lengths: tokens of each sample.
        setting: of the steps.
    """

    def __init__(self, strategy: str, lengths: Sequence[int], setting: Setting) -> None:
        self._strategy = strategy
        self._lengths = lengths
        self._setting = setting

    def __iter__(self) -> Iterator[Rows]:
        at = self._setting
        if self._strategy == "batch_rebalance":
            yield from self._rebalanced()
            return
        order = self._order()
        for start in range(0, len(order) - at.batch + 1, at.batch):
            batches = [order[i : i + at.per_device] for i in range(start, start + at.batch, at.per_device)]
            yield [batches[i : i + at.world_size] for i in range(0, len(batches), at.world_size)]

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(0)
        if self._strategy == "random":
            return torch.randperm(len(self._lengths), generator=generator).tolist()
        per_rank = self._setting.per_device * self._setting.accumulation  # what Trainer hands to its sampler
        return get_length_grouped_indices(self._lengths, per_rank, generator=generator)  # type: ignore[no-any-return]

    def _rebalanced(self) -> Iterator[Rows]:
        at = self._setting
        sampler = BatchRebalanceSampler(list(self._lengths), at.batch, at.world_size, at.accumulation)
        order = torch.randperm(len(self._lengths), generator=torch.Generator().manual_seed(0)).tolist()
        for start in range(0, len(order) - at.batch + 1, at.batch):
            chosen = order[start : start + at.batch]
            by_rank = sampler._assign(chosen, [self._lengths[i] for i in chosen])
            yield [list(row) for row in zip(*by_rank, strict=True)]


def collect(
    steps: Iterable[Rows],
    tokens: NDArray[np.int64],
    tiles: NDArray[np.int64],
    *,
    is_packed: bool,
    num_steps: int,
    seconds: float,
) -> tuple[list[StepCosts], float]:
    """Cost the first steps.

    Args:
        steps: that are cut.
        tokens: of each sample.
        tiles: of each sample.
        is_packed: see `step_costs`.
        num_steps: at most so many.
        seconds: no further step begins after this.

    Returns:
        At least one step, and the seconds that cutting one takes, as the median.
    """
    found: list[StepCosts] = []
    taken: list[float] = []
    iterator, began = iter(steps), time.perf_counter()
    while len(found) < num_steps and (not found or time.perf_counter() - began < seconds):
        started = time.perf_counter()
        rows = next(iterator, None)
        if rows is None:
            break
        taken.append(time.perf_counter() - started)
        found.append(step_costs(rows, tokens, tiles, is_packed=is_packed))
    return found, statistics.median(taken)
