"""One rank: a real run whose steps come from memory, and after every few of them a bare loop over the same ones.

python -m torch.distributed.run --nproc_per_node 2 -m tests.bench.loop.ranks RUN.yaml OUTPUT PAIRS STEPS PARTED

Behind the pairs come PARTED steps whose parts are timed one by one. Python collects no garbage in either loop.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tests.bench.loop.parts import Parts
from vlm_dist.build.ending import collective_timeout
from vlm_dist.build.run import run_parts
from vlm_dist.config import load_run
from vlm_dist.data.feed import FEED_FIELDS, FeedStep, StepFeed
from vlm_dist.data.types import MicroBatch, MicroBatchJob
from vlm_dist.distributed.agreement import StepAgreement
from vlm_dist.distributed.environment import resolve_topology
from vlm_dist.distributed.group import Ranks, init_process_groups, shut_down
from vlm_dist.distributed.signals import StopRequest
from vlm_dist.engine import Engine, prepare_deepspeed

_REST_SECONDS = 0.01


class Made:
    """A micro-batch that is there already; what a `PoolJob` is to the feed."""

    lost_seconds = 0.0

    def __init__(self, micro_batch: MicroBatch) -> None:
        self._micro_batch = micro_batch

    def result(self, timeout: float | None = None) -> MicroBatch:
        """At once."""
        return self._micro_batch


class MemoryPool:
    """A worker pool whose work is done.

    Args:
        made: job's step and micro-batch -> what it is.
    """

    num_workers = 1  # so that the feed has its thread, as it has beside real workers

    def __init__(self, made: dict[tuple[int, int], MicroBatch]) -> None:
        self._made = made
        self._steps: dict[int, float] = {}

    def submit(self, job: MicroBatchJob) -> Made:
        """What the feed's thread asks for."""
        self._steps.setdefault(job.step, time.thread_time())
        return Made(self._made[job.step, job.micro_batch])

    def thread_seconds(self) -> float:
        """What the feed's thread computes for a step: its own time, median."""
        times = list(self._steps.values())
        return statistics.median(after - before for before, after in pairwise(times))

    def close(self) -> None:
        """Nothing is open."""


def bare_step(engine: Engine, micro_batches: Sequence[MicroBatch], num_targets: int) -> None:
    """DeepSpeed's own three calls, with the loss that our loop has."""
    deepspeed = engine._deepspeed
    for batch in micro_batches:
        with engine.head.giving_loss(batch.labels, -100, None):
            loss = deepspeed(**batch.inputs, use_cache=False)["loss"]
        deepspeed.backward(loss * (engine.world_size / num_targets), scale_wrt_gas=False)
    deepspeed.step()


class PairedFeed:
    """The run's steps; before every group of them, the group before is run again in a bare loop.

    Args:
        feed: of the run.
        engine: of the run.
        ranks: that begin each measurement together.
        num_steps: of a group.
        num_pairs: groups that are measured.
        parts: times the steps that come behind them.
    """

    def __init__(
        self, feed: StepFeed, engine: Engine, ranks: Ranks, num_steps: int, num_pairs: int, parts: Parts
    ) -> None:
        self._feed = feed
        self._engine = engine
        self._ranks = ranks
        self._num_steps = num_steps
        self._num_pairs = num_pairs
        self._parts = parts
        self.pairs: list[tuple[float, float]] = []

    def __iter__(self) -> Iterator[FeedStep]:
        steps = iter(self._feed)
        group: list[FeedStep] = []
        started = 0.0
        for fetched in steps:
            if len(group) == self._num_steps:
                ours = time.perf_counter() - started
                self.pairs.append((ours, self._bare(group)))
                group = []
            if len(self.pairs) == self._num_pairs:
                yield from self._parted(fetched, steps)
                return
            if not group:
                if self._num_steps == 1:  # untimed: what is made once for a shape is made now, for neither
                    self._bare([fetched])
                self._begin_together()
                started = time.perf_counter()
            group.append(fetched)
            yield fetched

    def _parted(self, first: FeedStep, steps: Iterator[FeedStep]) -> Iterator[FeedStep]:
        self._begin_together()
        fetched: FeedStep | None = first
        self._parts.begin()
        while fetched is not None:
            yield fetched
            with self._parts.of("feed and agreement of the ranks"):
                following = next(steps, None)
            self._parts.end_step(self._bare([fetched]))
            fetched = following

    def _bare(self, group: Sequence[FeedStep]) -> float:
        assert not gc.isenabled()
        self._begin_together()
        started = time.perf_counter()
        for fetched in group:
            bare_step(self._engine, fetched.micro_batches, fetched.verdict.total["num_target_tokens"])
        return time.perf_counter() - started

    def _begin_together(self) -> None:
        """On all ranks, when the feed's thread has done what the last step that was taken made room for."""
        time.sleep(_REST_SECONDS)
        self._ranks.barrier()

    def close(self) -> None:
        """With the feed."""
        self._feed.close()


def make_all(feed: StepFeed, num_steps: int, ranks: Ranks) -> dict[tuple[int, int], MicroBatch]:
    """Have this rank's micro-batches of the first steps made by the run's own workers."""
    jobs = [job for step in range(num_steps) for job in feed._plan.step(step).for_rank(ranks.rank, ranks.world_size)]
    return {(job.step, job.micro_batch): feed._pool.submit(job).result() for job in jobs}


def main() -> None:
    """Run, and write the pairs of seconds."""
    path, output = sys.argv[1], Path(sys.argv[2])
    num_pairs, num_steps, num_parted = map(int, sys.argv[3:])
    torch.set_num_threads(1)
    prepare_deepspeed()
    config = load_run(path, [f"train.max_steps={(num_pairs + 1) * num_steps + num_parted + 1}"])
    ranks = init_process_groups(resolve_topology(os.environ), collective_timeout(config.train), StopRequest())
    with run_parts(config, ranks) as parts:
        trainer = parts.trainer
        real = trainer.feed
        pool = MemoryPool(make_all(real, trainer.cadence.num_steps, ranks))
        feed: Any = StepFeed(
            real._plan,
            pool,  # type: ignore[arg-type]
            rank=ranks.rank,
            world_size=ranks.world_size,
            agreement=StepAgreement(FEED_FIELDS, ranks.agreement, ranks.world_size),
            prefetch_steps=config.train.dataloader_prefetch_factor,
            stop_requested=lambda: ranks.stop.number,
        )
        timed = Parts(trainer)
        paired = PairedFeed(feed, trainer.engine, ranks, num_steps, num_pairs + 1, timed)
        trainer.feed = paired  # type: ignore[assignment]
        gc.collect()
        trainer.run()
        paired.close()
    if ranks.is_main:
        # the first pair warms up
        found = {"pairs": paired.pairs[1:], "parts": timed.microseconds(), "thread": 1e6 * pool.thread_seconds()}
        output.write_text(json.dumps(found))
    shut_down()


if __name__ == "__main__":
    main()
