"""The feed: every step once, in order, agreed; errors are voted; it can be closed at any time."""

import json
import threading
import time
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from tests.unit.data.samples import MemorySource
from vlm_dist.data import feed as feed_module
from vlm_dist.data.feed import FEED_FIELDS, StepFeed
from vlm_dist.data.plan.plan import Plan, PlanSettings
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.types import NULL_CLASSES, MicroBatch, NullSlot, SampleOrigin
from vlm_dist.data.workers import progress
from vlm_dist.data.workers.pool import WorkerPool
from vlm_dist.distributed.agreement import StepAgreement, Verdict
from vlm_dist.errors import DataError, DistributedError

NUM_ROWS = 22


@dataclass(frozen=True)
class Maker:
    """One target token per sample; some rows are bad, one step fails."""

    bad_rows: tuple[int, ...] = ()
    failing_step: int = -1
    seconds: float = 0.0

    def __call__(self, job):
        if job.step == self.failing_step:
            raise DataError("disk is gone")
        time.sleep(self.seconds)
        batch = MicroBatch(job, {}, torch.zeros(1, 1), 0, 0, 0, 8)
        for ref in job.refs:
            if ref is None:
                batch.null_slots.append(NullSlot(None, "tail", "the end"))
            elif ref.index in self.bad_rows:
                batch.null_slots.append(NullSlot(SampleOrigin("s", "t", str(ref.index)), "decode", "cut"))
            else:
                batch.origins.append(SampleOrigin("s", "t", str(ref.index)))
                batch.num_samples += 1
                batch.num_target_tokens += 1
        return batch


def make_feed(make, num_workers=0, world_size=1, **options):
    plan = Plan([MemorySource([{}] * NUM_ROWS)], [1.0], PlanSettings(4, 2, shuffle=False))
    options.setdefault("agreement", StepAgreement(FEED_FIELDS))
    return StepFeed(plan, WorkerPool(make, num_workers), 0, world_size, **options)


def keys(step):
    return [origin.key for batch in step.micro_batches for origin in batch.origins]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_step_once_and_in_order(num_workers):
    with make_feed(Maker(bad_rows=(5,)), num_workers) as feed:
        steps = list(feed)
    assert [step.plan.step for step in steps] == list(range(6))
    assert [key for step in steps for key in keys(step)] == [str(i) for i in range(NUM_ROWS) if i != 5]
    assert [step.verdict.total["num_target_tokens"] for step in steps] == [4, 3, 4, 4, 4, 2]
    assert steps[1].verdict.total["null_decode"] == 1
    assert steps[5].verdict.total["null_tail"] == 2
    assert all(step.data_wait_seconds >= 0 and step.error is None for step in steps)


def test_the_next_step_can_be_seen_before_it_is_asked_for():
    with make_feed(Maker(), 2) as feed:
        steps = []
        for step in feed:
            deadline = time.monotonic() + 20
            while step.next_ready() is None and step.plan.step < 5 and time.monotonic() < deadline:
                time.sleep(0.01)
            steps.append((step, step.next_ready(), step.next_ready()))
    assert [step.plan.step for step, *_ in steps] == list(range(6))
    for (_, seen, again), (following, *_) in pairwise(steps):
        assert seen is following.micro_batches[0] and again is seen
    assert steps[-1][1] is None
    with make_feed(Maker(), 0) as feed:
        assert all(step.next_ready() is None for step in feed)  # nobody makes it


@pytest.mark.parametrize("num_workers", [0, 1])
def test_it_starts_anywhere(num_workers):
    with make_feed(Maker(), num_workers, start_step=4) as feed:
        assert [step.plan.step for step in feed] == [4, 5]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_rank_that_cannot_fetch_votes_instead_of_raising(num_workers):
    with make_feed(Maker(failing_step=2), num_workers) as feed:
        steps = list(feed)
    assert [step.plan.step for step in steps] == [0, 1, 2]
    assert steps[2].verdict.ranks_with("fetch_error") == [0]
    assert "disk is gone" in str(steps[2].error)
    assert steps[2].micro_batches == []
    assert steps[1].verdict.ranks_with("fetch_error") == []


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("lookahead_steps", [0, 4])
def test_a_rank_that_cannot_plan_votes_instead_of_raising(num_workers, lookahead_steps, monkeypatch):
    step = Plan.step

    def failing(self, index):
        if index == 3:
            raise DataError("the index is gone")
        return step(self, index)

    monkeypatch.setattr(Plan, "step", failing)
    with make_feed(Maker(), num_workers, lookahead_steps=lookahead_steps) as feed:
        steps = list(feed)
    assert [bool(fetched.verdict.ranks_with("fetch_error")) for fetched in steps] == [False, False, False, True]
    assert "the index is gone" in str(steps[3].error)


def test_a_stop_request_is_voted():
    stop = []
    with make_feed(Maker(), stop_requested=lambda: bool(stop)) as feed:
        assert next(feed).verdict.ranks_with("stop") == []
        stop.append(1)
        assert next(feed).verdict.ranks_with("stop") == [0]


def test_steps_are_fetched_ahead_but_not_without_limit():
    votes = []

    class Agreement(StepAgreement):
        def vote(self, step, counts):
            votes.append(step)
            return super().vote(step, counts)

    with make_feed(Maker(), 1, prefetch_steps=2, agreement=Agreement(FEED_FIELDS)) as feed:
        next(feed)
        deadline = time.monotonic() + 20
        while len(votes) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        assert votes == [0, 1, 2]  # the one that was taken, and two ahead


def test_closing_in_the_middle_ends_thread_and_workers():
    before = set(threading.enumerate())
    feed = make_feed(Maker(seconds=0.05), 1)
    next(feed)
    started = time.monotonic()
    feed.close()
    assert time.monotonic() - started < 5
    assert set(threading.enumerate()) <= before
    assert list(feed) == []


def test_ranks_with_different_plans_find_out():
    class Other(StepAgreement):
        def vote(self, step, counts):
            pending = super().vote(step, counts)
            mine = pending.wait().per_rank
            there = {**mine, "plan_digest": [*mine["plan_digest"], 7]}
            pending.wait = lambda: Verdict(step, there)
            return pending

    with (
        make_feed(Maker(), agreement=Other(FEED_FIELDS)) as feed,
        pytest.raises(DistributedError, match=r"ranks \[1\]"),
    ):
        next(feed)


def test_skipped_samples_are_written_down_when_their_step_is_taken(tmp_path):
    with Quarantine(tmp_path, 0) as quarantine, make_feed(Maker(bad_rows=(1, 9)), quarantine=quarantine) as feed:
        next(feed)
        assert quarantine.counts == {"decode": 1}
        list(feed)
        lines = quarantine.path.read_text().splitlines()
    assert [(json.loads(line)["key"], json.loads(line)["step"]) for line in lines] == [("1", 0), ("9", 2)]


def test_nothing_but_bad_samples_ends_the_run_and_says_why(monkeypatch):
    monkeypatch.setattr(feed_module, "MAX_BAD_SAMPLES_IN_A_ROW", 8)
    with make_feed(Maker(bad_rows=tuple(range(3, NUM_ROWS)))) as feed:
        steps = list(feed)
    assert len(steps) == 3
    assert "s/t:4 (decode): cut" in str(steps[-1].error)
    with make_feed(Maker(bad_rows=tuple(range(1, NUM_ROWS, 2)))) as feed:
        assert len(list(feed)) == 6  # every second one is


def test_too_many_bad_samples_are_told_with_the_step_that_was_one_too_many():
    with make_feed(Maker(bad_rows=(1, 6, 9)), max_bad_share=0.0015) as feed:  # of a thousand: one
        first, second = next(feed), next(feed)
    assert first.overdrawn is None
    assert first.bad_samples == ()
    assert (second.overdrawn.by_class["decode"], second.overdrawn.num_samples) == (2, 8)
    assert second.bad_samples == ("s/t:1 (decode): cut", "s/t:6 (decode): cut")
    assert second.error is None  # nothing failed: whoever trains decides


@dataclass(frozen=True)
class Hanging(Maker):
    """The row `bad_rows[0]` never comes back from its decoder."""

    def __call__(self, job):
        condemned = {one.slot for one in job.condemned}
        for slot, ref in enumerate(job.refs):
            progress.decoding(slot)
            if ref is not None and ref.index in self.bad_rows and slot not in condemned:
                time.sleep(600)
        progress.between_samples()
        return super().__call__(job)


def test_a_step_that_loses_too_much_time_is_voted_and_not_waited_for(monkeypatch):
    """The other ranks would give up, each with a message of its own that names no sample."""
    monkeypatch.setattr(feed_module, "MAX_LOST_SECONDS", 1.5)
    monkeypatch.setattr(feed_module, "_LOOK_SECONDS", 0.1)
    plan = Plan([MemorySource([{}] * NUM_ROWS)], [1.0], PlanSettings(4, 2, shuffle=False))
    pool = WorkerPool(Hanging(bad_rows=(4, 5, 6, 7)), 1, sample_timeout_seconds=0.5)
    with StepFeed(plan, pool, 0, 1, StepAgreement(FEED_FIELDS)) as feed:
        steps = list(feed)
    assert [step.plan.step for step in steps] == [0, 1]
    assert steps[1].verdict.ranks_with("fetch_error") == [0]
    assert "step 1" in str(steps[1].error) and "data.sample_timeout_seconds" in str(steps[1].error)


def test_every_count_of_a_vote_is_a_field():
    assert {"plan_digest", "stop", "fetch_error", "num_target_tokens", "num_samples"} <= set(FEED_FIELDS)
    assert {f"null_{name}" for name in NULL_CLASSES} <= set(FEED_FIELDS)
