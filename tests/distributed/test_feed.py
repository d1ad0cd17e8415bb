"""The feed on two ranks: what one of them finds, both know, at the same step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from tests.ranks import Ranks, run_ranks
from tests.unit.data.samples import MemorySource
from vlm_dist.data.feed import FEED_FIELDS, StepFeed
from vlm_dist.data.plan.plan import Plan, PlanSettings
from vlm_dist.data.types import MicroBatch, MicroBatchJob, NullSlot, SampleOrigin
from vlm_dist.data.workers.pool import WorkerPool
from vlm_dist.distributed.agreement import StepAgreement
from vlm_dist.errors import DataError


@dataclass(frozen=True)
class Maker:
    rank: int
    failing_step: int = -1
    bad_rows: tuple[int, ...] = ()

    def __call__(self, job: MicroBatchJob) -> MicroBatch:
        if self.rank == 1 and job.step == self.failing_step:
            raise DataError("the disk of rank 1 is gone")
        rows = [ref.index for ref in job.refs if ref is not None]
        bad = [NullSlot(SampleOrigin("s", "t", str(row)), "decode", "cut") for row in rows if row in self.bad_rows]
        num_samples = len(rows) - len(bad)
        return MicroBatch(job, {}, torch.zeros(1, 1), num_samples, 10 * num_samples, 0, 0, bad)


def steps_seen(ranks: Ranks, failing_step: int, stop_at: int) -> list[tuple[int, int, list[int], list[int]]]:
    plan = Plan([MemorySource([{}] * 30)], [1.0], PlanSettings(8, 2))
    agreement = StepAgreement(FEED_FIELDS, ranks.agreement, ranks.world_size)
    seen: list[tuple[int, int, list[int], list[int]]] = []

    def stop_requested() -> bool:
        return ranks.rank == 0 and len(seen) >= stop_at

    pool = WorkerPool(Maker(ranks.rank, failing_step), 0)
    with StepFeed(plan, pool, ranks.rank, ranks.world_size, agreement, stop_requested=stop_requested) as feed:
        for step in feed:
            verdict = step.verdict
            seen.append(
                (
                    step.plan.step,
                    verdict.total["num_target_tokens"],
                    verdict.ranks_with("fetch_error"),
                    verdict.ranks_with("stop"),
                )
            )
            if verdict.ranks_with("stop") or verdict.ranks_with("fetch_error"):
                break
    return seen


def test_both_ranks_count_the_targets_of_both() -> None:
    one, other = run_ranks(steps_seen, 2, -1, 99)
    assert one == other
    assert [targets for _, targets, _, _ in one] == [80, 80, 80, 60]


def test_both_ranks_leave_when_one_is_asked_to() -> None:
    one, other = run_ranks(steps_seen, 2, -1, 2)
    assert one == other
    assert one[-1] == (2, 40, [], [0])  # it fetches nothing any more


class Request:
    """A wish to stop that comes after some time."""

    def __init__(self, seconds: float) -> None:
        self.when = time.monotonic() + seconds

    def __call__(self) -> int:
        return 15 * (time.monotonic() > self.when)


class SlowJob:
    lost_seconds = 0.0

    def __init__(self, make: Maker, job: MicroBatchJob) -> None:
        self._make, self._job = make, job

    def result(self, timeout_seconds: float) -> MicroBatch:
        if self._job.step == 3 and self._make.rank == 1:
            time.sleep(timeout_seconds)
            raise TimeoutError
        return self._make(self._job)


class SlowPool:
    """Has workers, of which those of rank 1 never finish step 3."""

    num_workers = 1

    def __init__(self, make: Maker) -> None:
        self._make = make

    def submit(self, job: MicroBatchJob) -> SlowJob:
        return SlowJob(self._make, job)

    def close(self) -> None:
        pass


def stop_while_data_is_slow(ranks: Ranks) -> tuple[list[int], list[int], float]:
    plan = Plan([MemorySource([{}] * 64)], [1.0], PlanSettings(8, 2))
    agreement = StepAgreement(FEED_FIELDS, ranks.agreement, ranks.world_size)
    started = time.monotonic()
    stop = Request(3.0)
    pool: Any = SlowPool(Maker(ranks.rank))
    with StepFeed(plan, pool, ranks.rank, ranks.world_size, agreement, stop_requested=stop) as feed:
        for step in feed:
            if step.verdict.ranks_with("stop"):
                return [step.plan.step], step.verdict.per_rank["stop"], time.monotonic() - started
    return [], [], 0.0


def test_a_stop_does_not_wait_for_slow_data_and_all_leave_at_the_same_step() -> None:
    results = run_ranks(stop_while_data_is_slow, 2)
    assert [step for step, _, _ in results] == [[3], [3]]
    assert results[0][1] == results[1][1] in ([0, 15], [15, 15])
    assert all(seconds < 20 for _, _, seconds in results)


def test_both_ranks_leave_when_one_cannot_read() -> None:
    one, other = run_ranks(steps_seen, 2, 1, 99)
    assert one == other
    assert one[-1][0] == 1
    assert one[-1][2] == [1]


def budgets_seen(ranks: Ranks, bad_rows: tuple[int, ...]) -> list[tuple[int, int | None, tuple[str, ...]]]:
    plan = Plan([MemorySource([{}] * 32)], [1.0], PlanSettings(8, 2, shuffle=False))
    agreement = StepAgreement(FEED_FIELDS, ranks.agreement, ranks.world_size)
    pool = WorkerPool(Maker(ranks.rank, bad_rows=bad_rows), 0)
    seen: list[tuple[int, int | None, tuple[str, ...]]] = []
    with StepFeed(plan, pool, ranks.rank, ranks.world_size, agreement, max_bad_share=0.002) as feed:
        for step in feed:
            bad = step.overdrawn.by_class["decode"] if step.overdrawn is not None else None
            seen.append((step.plan.step, bad, tuple(step.bad_samples)))
    return seen


def test_damage_is_counted_over_all_ranks_and_all_find_it_at_the_same_step() -> None:
    one, other = run_ranks(budgets_seen, 2, (0, 10, 17))  # two of them are one rank's, the third the other's
    assert [seen[:2] for seen in one] == [seen[:2] for seen in other] == [(0, None), (1, None), (2, 3), (3, 3)]
    examples = sorted(example for seen in (one, other) for example in seen[2][2])
    assert examples == ["s/t:0 (decode): cut", "s/t:10 (decode): cut", "s/t:17 (decode): cut"]
    assert one[2][2] != other[2][2]  # each knows its own, and the trainer gathers them
