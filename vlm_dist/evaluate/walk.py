"""The way through a held-out source: every sample once, and on every rank as many micro-batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from vlm_dist.config.answer_metrics import OVERALL
from vlm_dist.data.lookahead import announce
from vlm_dist.data.plan.plan import Plan, PlanSettings
from vlm_dist.data.types import MicroBatch, MicroBatchJob, SampleRef, Source
from vlm_dist.distributed.failures import agree_on_failure
from vlm_dist.distributed.group import Ranks

#: Micro-batches that are asked for before the first of them is needed.
_PREFETCH = 3
_ANNOUNCED = 32  # micro-batches that the sources are told of before they are needed


class Pool(Protocol):
    """Makes micro-batches; `vlm_dist.data.workers.pool.WorkerPool` is one."""

    def submit(self, job: MicroBatchJob) -> Any:
        """Something whose `result()` is the job's `MicroBatch`."""


class Walk:
    """Walks sources with the same plan as training, its order fixed, and empty slots at the end.

    Args:
        sources: `data.eval`; a `SampleRef.source` in the pools' jobs is a position in it.
        ranks: this process among its peers.
        per_device_batch_size: samples per forward.

    Raises:
        DataError: a source has no samples.
    """

    def __init__(self, sources: Sequence[Source], ranks: Ranks, per_device_batch_size: int) -> None:
        self.sources = list(sources)
        self._ranks = ranks
        settings = PlanSettings(
            global_batch_size=per_device_batch_size * ranks.world_size,
            micro_batch_size=per_device_batch_size,
            shuffle=False,
        )
        self.plans = [Plan([source], [1.0], settings) for source in sources]

    def micro_batches(self, number: int, pool: Pool, phase: str) -> Iterator[MicroBatch]:
        """This rank's micro-batches of one source, asked for a little ahead. Collective: the ranks agree on each.

        Args:
            number: of the source.
            pool: makes them.
            phase: what is done with them, for the watchdog's messages.
        """
        jobs = deque[MicroBatchJob]()
        # A rank that cannot plan or read must not leave the others waiting in the model's collectives.
        with agree_on_failure(self._ranks, leaves_if_asked=True):
            jobs.extend(
                MicroBatchJob(job.step, job.micro_batch, tuple(_of_source(ref, number) for ref in job.refs))
                for step in self.plans[number].steps()
                for job in step.for_rank(self._ranks.rank, self._ranks.world_size)
            )
        unannounced, pending = deque(jobs), deque[Any]()
        batch: MicroBatch | None = None
        for _ in range(len(jobs)):
            self._ranks.progress.at("evaluation", samples=batch.origins if batch is not None else ())
            with agree_on_failure(self._ranks, leaves_if_asked=True):
                while unannounced and len(unannounced) + _ANNOUNCED > len(jobs):
                    announce(self.sources, unannounced.popleft().refs)
                while jobs and len(pending) < _PREFETCH:
                    pending.append(pool.submit(jobs.popleft()))
                batch = pending.popleft().result()
            assert batch is not None
            self._ranks.progress.at(phase, samples=batch.origins)
            yield batch

    def rows(self, number: int, batch: MicroBatch) -> list[int]:
        """Rows of a source that a batch's samples came from, in the batch's order."""
        source = self.sources[number]
        rows: dict[str, deque[int]] = {}
        for ref in batch.job.refs:
            if ref is not None:
                rows.setdefault(str(source.origin(ref.index)), deque()).append(ref.index)
        return [rows[str(origin)].popleft() for origin in batch.origins]


def distinct_names(sources: Sequence[Source]) -> list[str]:
    """What each source is called in the figures."""
    names = [source.name for source in sources]
    taken = [*names, OVERALL]
    return [name if taken.count(name) == 1 else f"{name}#{number}" for number, name in enumerate(names)]


def _of_source(ref: SampleRef | None, number: int) -> SampleRef | None:
    """Each source has a plan of its own; the pools know all sources."""
    return None if ref is None else SampleRef(number, ref.index, ref.repeat)
