"""What a plan costs: padding, and how long ranks wait for each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.plan.plan import Plan
from vlm_dist.data.types import MicroBatchJob, StepPlan

# Shapes: M micro-batches per rank, W ranks; 2 costs: tokens that are computed, and patches


@dataclass(frozen=True)
class PlanFigures:
    """Figures of some steps, as predicted; costs are those of the tokens that are computed, and of the patches.

    Attributes:
        num_steps: measured.
        padding_share: pad tokens / computed tokens.
        token_max_over_mean: cost of a step's slowest rank / mean over the ranks, over all steps.
        patch_max_over_mean: the same for patches; 1 where there are none.
        token_row_max_over_mean: the same where ranks wait for each other after every micro-batch (ZeRO-3).
        patch_row_max_over_mean: the same for patches.
        idle_share: 1 - sum of token costs / (W x sum over steps of the slowest rank's cost).
        micro_batches_per_rank: mean over steps.
        samples_per_micro_batch: mean over those that are not empty.
        max_tokens: the most that one micro-batch computes.
        max_patches: the same for patches.
    """

    num_steps: int
    padding_share: float
    token_max_over_mean: float
    patch_max_over_mean: float
    token_row_max_over_mean: float
    patch_row_max_over_mean: float
    idle_share: float
    micro_batches_per_rank: float
    samples_per_micro_batch: float
    max_tokens: int
    max_patches: int


@dataclass(frozen=True)
class JobCosts:
    """Predicted costs of one micro-batch.

    Attributes:
        num_samples: in it.
        tokens: of its samples.
        computed_tokens: with padding.
        patches: of its samples.
    """

    num_samples: int
    tokens: int
    computed_tokens: int
    patches: int


def job_costs(plan: Plan, jobs: Iterable[MicroBatchJob]) -> list[JobCosts]:
    """Predict the costs of micro-batches."""
    jobs = list(jobs)
    refs = [[ref for ref in job.refs if ref is not None] for job in jobs]
    costs = plan.costs([ref for some in refs for ref in some])
    found, start = [], 0
    for job, some in zip(jobs, refs, strict=True):
        mine = slice(start, start + len(some))
        tokens, patches = costs.tokens[mine], costs.patches[mine]
        num = int(tokens.sum())
        padded = num if job.pack is not None else int(tokens.max(initial=0)) * len(some)
        found.append(JobCosts(len(some), num, padded, int(patches.sum())))
        start += len(some)
    return found


def measure(plan: Plan, steps: Iterable[StepPlan], world_size: int) -> PlanFigures:
    """Add up the predicted costs of some steps on so many ranks.

    Args:
        plan: that has the steps.
        steps: at least one.
        world_size: number of ranks.
    """
    num_steps = num_rows = num_samples = num_full = tokens = 0
    largest = np.zeros(2, dtype=np.int64)
    rank_max, row_max, total = np.zeros(2), np.zeros(2), np.zeros(2)
    for step in steps:
        by_rank = [step.for_rank(rank, world_size) for rank in range(world_size)]
        rows = len(by_rank[0])
        made = job_costs(plan, (jobs[row] for row in range(rows) for jobs in by_rank))
        costs: NDArray[np.int64] = np.array([[one.computed_tokens, one.patches] for one in made]).reshape(rows, -1, 2)
        num_steps += 1
        num_rows += rows
        num_samples += sum(one.num_samples for one in made)
        num_full += sum(one.num_samples > 0 for one in made)
        tokens += sum(one.tokens for one in made)
        largest = np.maximum(largest, costs.max(axis=(0, 1)))
        rank_max += costs.sum(axis=0).max(axis=0)
        row_max += costs.max(axis=1).sum(axis=0)
        total += costs.sum(axis=(0, 1))
    mean = total / world_size
    over = np.divide(rank_max, mean, out=np.ones(2), where=mean > 0)
    over_rows = np.divide(row_max, mean, out=np.ones(2), where=mean > 0)
    return PlanFigures(
        num_steps=num_steps,
        padding_share=1 - tokens / max(float(total[0]), 1.0),
        token_max_over_mean=float(over[0]),
        patch_max_over_mean=float(over[1]),
        token_row_max_over_mean=float(over_rows[0]),
        patch_row_max_over_mean=float(over_rows[1]),
        idle_share=1 - 1 / float(over[0]),
        micro_batches_per_rank=num_rows / max(num_steps, 1),
        samples_per_micro_batch=num_samples / max(num_full, 1),
        max_tokens=int(largest[0]),
        max_patches=int(largest[1]),
    )
