"""Brings the steps of the plan to the trainer, agreed by all ranks, while earlier steps are still trained on."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from vlm_dist.data.error_budget import BAD_CLASSES, ErrorBudget, Overdrawn
from vlm_dist.data.lookahead import Lookahead
from vlm_dist.data.plan.plan import Plan
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.types import NULL_CLASSES, MicroBatch, NullSlot, Source, StepPlan
from vlm_dist.data.workers.pool import PoolClosedError, PoolJob, WorkerPool
from vlm_dist.distributed.agreement import Pending, StepAgreement, Verdict
from vlm_dist.errors import DataError, DistributedError

log = logging.getLogger(__name__)

_COUNTS = ("num_target_tokens", "num_tokens", "num_computed_tokens", "num_samples", "num_reduced", "num_cut")

#: What the ranks tell each other about a step; the fields of the StepAgreement that the feed is given.
FEED_FIELDS = ("plan_digest", "stop", "fetch_error", "save_error", *_COUNTS, *(f"null_{name}" for name in NULL_CLASSES))

#: So many samples in a row that cannot be used are no bad luck: something is wrong with the data or the settings.
MAX_BAD_SAMPLES_IN_A_ROW = 64

#: What the steps that are under way at once may lose to samples that crash or hang: the others' votes on them wait for
#: ours, and give up after 15 minutes.
MAX_LOST_SECONDS = 720.0

_LOOK_SECONDS = 0.5
_NUM_EXAMPLES = 3


@dataclass(slots=True)
class FeedStep:
    """One step, ready to train on.

    Attributes:
        plan: which samples, on all ranks.
        micro_batches: of this rank; empty after an error.
        verdict: what all ranks found; the same on all of them.
        data_wait_seconds: time that the caller waited for this step and for the other ranks' votes on it.
        fetch_seconds: of it, until this rank's own micro-batches were there.
        error: why this rank could not make its micro-batches, where it could not.
        overdrawn: with this step too many samples of all ranks were unusable; the same on all ranks.
        bad_samples: this rank's first few unusable samples of the last steps, where the budget is overdrawn.
        next_ready: gives the first micro-batch of the step that comes next, if it is there already.
    """

    plan: StepPlan
    micro_batches: list[MicroBatch]
    verdict: Verdict
    data_wait_seconds: float
    error: Exception | None = None
    overdrawn: Overdrawn | None = None
    bad_samples: Sequence[str] = ()
    fetch_seconds: float = 0.0
    next_ready: Callable[[], MicroBatch | None] = lambda: None

    def in_order(self) -> Iterator[tuple[MicroBatch, Callable[[], MicroBatch | None]]]:
        """Each micro-batch, and what tells the one behind it, in this step or the next, as far as it is there."""
        for number, micro_batch in enumerate(self.micro_batches, 1):
            if number == len(self.micro_batches):
                yield micro_batch, self.next_ready
            else:
                yield micro_batch, partial(self.micro_batches.__getitem__, number)


@dataclass(slots=True)
class _Fetched:
    plan: StepPlan
    micro_batches: list[MicroBatch]
    error: Exception | None
    vote: Pending
    is_last: bool  # nothing is voted on after an error, or a wish to stop


class _StopError(Exception):
    """This rank was asked to stop while it waited for a step's micro-batches."""


class StepFeed:
    """Iterates over `FeedStep`s from a position to the end of the plan.

    A step is voted on as soon as its micro-batches are there, while earlier steps are trained on. A rank that cannot
    fetch a step does not raise, since the others would wait for it: it votes, and all ranks leave together.

    Args:
        plan: the same on all ranks.
        pool: makes micro-batches; the feed closes it.
        rank: of this process.
        world_size: number of ranks.
        agreement: with the fields `FEED_FIELDS`; used by nothing else.
        start_step: first step.
        prefetch_steps: how many steps are fetched ahead of the one that is trained on, where the pool has workers.
        stop_requested: the signal that asks to stop, or 0; asked once per step, for the vote, and while a step is
            waited for: a step that is voted on with a stop may have no micro-batches.
        save_failed: asked once per step, for the vote: could this rank not write a checkpoint?
        quarantine: where unusable samples are written down.
        max_bad_share: share of the samples of all ranks that may be unusable; see `ErrorBudget`.
        sources: of the plan, told what will be read.
        lookahead_steps: how many steps before it is needed.
    """

    def __init__(
        self,
        plan: Plan,
        pool: WorkerPool,
        rank: int,
        world_size: int,
        agreement: StepAgreement,
        start_step: int = 0,
        prefetch_steps: int = 2,
        stop_requested: Callable[[], int] = lambda: 0,
        save_failed: Callable[[], bool] = lambda: False,
        quarantine: Quarantine | None = None,
        max_bad_share: float = 1.0,
        sources: Sequence[Source] = (),
        lookahead_steps: int = 0,
    ) -> None:
        self._plan = plan
        self._steps = Lookahead(plan, sources, rank, world_size, lookahead_steps)
        self._pool = pool
        self._rank = rank
        self._world_size = world_size
        self._agreement = agreement
        self._next_step = start_step
        self._stop_requested = stop_requested
        self._save_failed = save_failed
        self._quarantine = quarantine
        self._digest = int(plan.cut_digest[:15], 16)  # fits an int64
        self._bad_in_a_row: list[NullSlot] = []
        self._budget = ErrorBudget(max_bad_share)
        self._last_bad: deque[str] = deque(maxlen=_NUM_EXAMPLES)
        self._num_ahead = max(1, prefetch_steps)
        self._lost_seconds: deque[float] = deque(maxlen=self._num_ahead)  # of the last steps
        self._room = threading.Semaphore(self._num_ahead)
        self._ready: queue.SimpleQueue[_Fetched | Exception | None] = queue.SimpleQueue()
        self._seen: list[_Fetched | Exception | None] = []  # taken from the queue to be looked at, at most one
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._ended = False

    def __iter__(self) -> Iterator[FeedStep]:
        return self

    def __next__(self) -> FeedStep:
        """Give the next step. Collective: every rank calls this.

        Raises:
            DistributedError: a rank is gone, or has another plan.
        """
        if self._ended or self._closing.is_set():
            raise StopIteration
        started = time.perf_counter()
        fetched = self._fetch_here() if self._pool.num_workers == 0 else self._take()
        if fetched is None:
            self._ended = True
            raise StopIteration
        own = time.perf_counter() - started
        verdict = fetched.vote.wait()
        waited = time.perf_counter() - started
        self._check_digest(verdict)
        if fetched.is_last:
            self._ended = True
        null_slots = [slot for batch in fetched.micro_batches for slot in batch.null_slots]
        if self._quarantine is not None:
            self._quarantine.record(fetched.plan.step, null_slots)
        self._last_bad += [_describe(slot) for slot in null_slots if slot.null_class in BAD_CLASSES]
        overdrawn = self._budget.add(verdict.total)
        return FeedStep(
            fetched.plan,
            fetched.micro_batches,
            verdict,
            waited,
            fetched.error,
            overdrawn,
            tuple(self._last_bad) if overdrawn else (),
            own,
            self._next_ready,
        )

    def close(self) -> None:
        """End the thread and the workers, also in the middle of an epoch."""
        self._closing.set()
        self._room.release()
        self._pool.close()
        if self._thread is not None:
            self._thread.join(timeout=30)

    def __enter__(self) -> StepFeed:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _fetch_here(self) -> _Fetched | None:
        if self._next_step >= self._plan.num_steps:
            return None
        plan, jobs = self._start_next()
        self._steps.look_ahead(plan.step)
        return self._collect(plan, jobs)

    def _take(self) -> _Fetched | None:
        """Wait for the thread; taking a step makes room for another."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._prefetch, name="step-feed", daemon=True)
            self._thread.start()
        item = self._seen.pop() if self._seen else self._ready.get()
        self._room.release()
        if isinstance(item, Exception):
            raise item
        return item

    def _next_ready(self) -> MicroBatch | None:
        """The first micro-batch of the next step, without waiting for it."""
        if not self._seen:
            try:
                self._seen.append(self._ready.get_nowait())
            except queue.Empty:
                return None
        item = self._seen[0]
        return item.micro_batches[0] if isinstance(item, _Fetched) and item.micro_batches else None

    def _prefetch(self) -> None:
        """Run in the thread: keep `prefetch_steps` steps either at the workers or ready."""
        under_way: deque[tuple[StepPlan, list[PoolJob] | Exception]] = deque()
        try:
            while not self._closing.is_set():
                while self._next_step < self._plan.num_steps and self._room.acquire(blocking=not under_way):
                    if self._closing.is_set():
                        return
                    under_way.append(self._start_next())
                    self._steps.look_ahead(under_way[-1][0].step)
                if not under_way:
                    self._ready.put(None)
                    return
                fetched = self._collect(*under_way.popleft())
                self._ready.put(fetched)
                if fetched.is_last:
                    return
        except PoolClosedError:
            self._ready.put(None)  # `close` is at work
        except Exception as error:  # noqa: BLE001 - raised in the caller's thread
            self._ready.put(error)

    def _start_next(self) -> tuple[StepPlan, list[PoolJob] | Exception]:
        """Plan the next step and hand it to the workers; what fails is voted on, as planning reads indexes too."""
        index = self._next_step
        self._next_step += 1
        try:
            plan = self._steps.take(index)
        except Exception as error:  # noqa: BLE001 - voted on in `_collect`
            return StepPlan(index, 0.0, ()), error
        return plan, self._submit(plan)

    def _submit(self, plan: StepPlan) -> list[PoolJob] | Exception:
        try:
            return [self._pool.submit(job) for job in plan.for_rank(self._rank, self._world_size)]
        except PoolClosedError:
            raise
        except Exception as error:  # noqa: BLE001 - voted on in `_collect`
            return error

    def _collect(self, plan: StepPlan, jobs: list[PoolJob] | Exception) -> _Fetched:
        """Wait for a step's micro-batches and vote on it. Collective: every rank does this once per step, in order."""
        batches: list[MicroBatch] = []
        error: Exception | None = None
        try:
            if isinstance(jobs, Exception):
                raise jobs
            batches = self._await(plan.step, jobs)
            self._break_circuit(batches)
        except PoolClosedError:
            raise
        except _StopError:
            batches = []
        except Exception as caught:  # voted, so that all ranks leave together
            log.error("step %d cannot be fetched: %s", plan.step, caught, exc_info=not isinstance(caught, DataError))
            batches, error = [], caught
        counts = {name: sum(getattr(batch, name) for batch in batches) for name in _COUNTS}
        for name in NULL_CLASSES:
            counts[f"null_{name}"] = sum(slot.null_class == name for batch in batches for slot in batch.null_slots)
        counts["plan_digest"] = self._digest
        counts["fetch_error"] = int(error is not None)
        counts["save_error"] = int(self._save_failed())
        counts["stop"] = int(self._stop_requested())
        is_last = error is not None or counts["stop"] > 0
        return _Fetched(plan, batches, error, self._agreement.vote(plan.step, counts), is_last)

    def _await(self, step: int, jobs: Sequence[PoolJob]) -> list[MicroBatch]:
        """Wait for a step's micro-batches, unless so much is lost over them that the other ranks would give up.

        Raises:
            DataError: one cannot be made, or not in time.
            _StopError: nobody needs them any more.
        """
        started = time.monotonic()
        batches: list[MicroBatch] = []

        def lost_seconds() -> float:
            """What this step is late by, at most: jobs lose time side by side, and mostly while nobody waits."""
            return min(time.monotonic() - started, sum(job.lost_seconds for job in jobs))

        for job in jobs:
            while True:
                if self._stop_requested():
                    raise _StopError
                try:
                    batches.append(job.result(_LOOK_SECONDS))
                    break
                except TimeoutError:
                    lost = lost_seconds() + sum(self._lost_seconds)
                    if lost > MAX_LOST_SECONDS:
                        raise DataError(
                            f"step {step} and the {len(self._lost_seconds)} before it lost {lost:.0f} s to samples "
                            "that crash or hang their decoder (the warnings above name them). "
                            "Take them out of the data, or lower data.sample_timeout_seconds"
                        ) from None
        self._lost_seconds.append(lost_seconds())
        return batches

    def _break_circuit(self, batches: Sequence[MicroBatch]) -> None:
        """Give up when nothing but unusable samples comes: the run would go on without learning anything."""
        for batch in batches:
            if batch.num_samples:
                self._bad_in_a_row.clear()
            else:
                self._bad_in_a_row += [slot for slot in batch.null_slots if slot.origin is not None]
        if len(self._bad_in_a_row) >= MAX_BAD_SAMPLES_IN_A_ROW:
            shown = [f"  {_describe(slot)}" for slot in self._bad_in_a_row[:_NUM_EXAMPLES]]
            raise DataError(
                f"none of the last {len(self._bad_in_a_row)} samples can be used: the settings or the data are wrong\n"
                + "\n".join(shown)
            )

    def _check_digest(self, verdict: Verdict) -> None:
        digests = verdict.per_rank["plan_digest"]
        if len(set(digests)) > 1:
            odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            raise DistributedError(
                f"step {verdict.step}: ranks {odd} have another plan than rank 0; "
                "check that all nodes see the same data and the same config"
            )


def _describe(slot: NullSlot) -> str:
    return f"{slot.origin} ({slot.null_class}): {slot.message}"
