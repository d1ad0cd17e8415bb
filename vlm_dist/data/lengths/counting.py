"""Counts the tokens of all samples in data workers; what is counted is kept, so that a stopped count goes on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from vlm_dist.data.lengths.token_store import LOST, NO_COUNT, Outcome, ShardCounts, TokenStore
from vlm_dist.data.types import MicroBatch, MicroBatchJob, NullSlot, SampleRef, Source

#: Samples of one job of a worker: enough to make the way to it cheap, few enough for a lively progress bar.
ROWS_PER_JOB = 32

#: Seconds after which counts of unfinished shards are kept: so much is lost at most.
_KEEP_EVERY = 20.0

#: Jobs per worker that are asked for ahead.
_AHEAD = 3

_LOST_CLASSES = ("timeout", "crash")  # which a busy or full machine may cause


class MeasuresSamples(Protocol):
    """Tells the lengths of samples; `Materialiser` is one. Picklable."""

    def measure(self, job: MicroBatchJob) -> Sequence[Any]:
        """Give `num_tokens`, `num_visual_tokens`, `was_reduced`, `was_cut` of each, or a `NullSlot`."""


class Pool(Protocol):
    """Does jobs; `WorkerPool` is one."""

    num_workers: int

    def submit(self, job: MicroBatchJob) -> Any:
        """Something whose `result()` is what `CountSamples` gives for the job."""


@dataclass(frozen=True)
class CountSamples:
    """What a data worker does in the place of a materialiser; picklable.

    Args:
        samples: tells the lengths.
        patches_per_token: of the family.
    """

    samples: MeasuresSamples
    patches_per_token: int

    def __call__(self, job: MicroBatchJob) -> MicroBatch:
        """Count; the counts travel as `inputs["counts"]` [N, 3]: tokens, patches, outcome."""
        rows = [self._row(length) for length in self.samples.measure(job)]
        counts = torch.tensor(rows, dtype=torch.int32).reshape(-1, 3)
        return MicroBatch(job, {"counts": counts}, torch.empty(0), 0, 0, 0, 0)

    def name_samples(self, job: MicroBatchJob) -> list[str]:
        """Name a job's samples, for messages."""
        names: list[str] = getattr(self.samples, "name_samples", lambda job: [])(job)
        return names

    def _row(self, length: Any) -> tuple[int, int, int]:
        if isinstance(length, NullSlot):
            if length.null_class in _LOST_CLASSES:
                return LOST, LOST, Outcome.LOST
            outcome = Outcome.TOO_LONG if length.null_class == "too_long" else Outcome.UNUSABLE
            return NO_COUNT, NO_COUNT, outcome
        outcome = Outcome.CUT if length.was_cut else Outcome.REDUCED if length.was_reduced else Outcome.FITS
        return length.num_tokens, length.num_visual_tokens * self.patches_per_token, outcome


@dataclass(slots=True)
class _OpenShard:
    """A shard whose counts are on their way."""

    digest: str
    counts: ShardCounts
    num_left: int  # jobs


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of one shard that are counted in one job."""

    shard: _OpenShard
    rows: list[int]  # of the source
    within: list[int]  # the same, within the whole shard


def count_tokens(
    sources: Sequence[Source], stores: Sequence[TokenStore], pool: Pool, advance: Callable[[int], None]
) -> None:
    """Count what has not been counted yet, and what was lost to a time-out or a crash.

    A shard's counts are written when all its samples are counted; those of an unfinished one now and then, and when
    the counting is broken off.

    Args:
        sources: of the run.
        stores: of each source.
        pool: its workers do `CountSamples`.
        advance: told how many samples more are done; those that were before come at once.

    Raises:
        DataError: the storage fails, or the counts cannot be written.
    """
    for number, (source, store) in enumerate(zip(sources, stores, strict=True)):
        unfinished: dict[str, _OpenShard] = {}
        kept_at = time.monotonic()
        try:
            for part, counts in _run(_parts(source, store, unfinished, advance), number, pool):
                shard = part.shard
                shard.counts.tokens[part.within] = counts[:, 0]
                shard.counts.patches[part.within] = counts[:, 1]
                shard.counts.outcomes[part.within] = counts[:, 2]
                shard.num_left -= 1
                if shard.num_left == 0:
                    store.write(shard.digest, shard.counts)
                    unfinished.pop(shard.digest, None)
                elif time.monotonic() > kept_at + _KEEP_EVERY:
                    store.write(shard.digest, shard.counts)
                    kept_at = time.monotonic()
                advance(len(part.rows))
        finally:
            for shard in unfinished.values():
                store.write(shard.digest, shard.counts)
        store.mark_covered(source)


def _parts(
    source: Source, store: TokenStore, unfinished: dict[str, _OpenShard], advance: Callable[[int], None]
) -> Iterator[_Part]:
    """Cut what is left to count into parts, shard by shard."""
    for state in store.scan(source):
        missing = np.flatnonzero(state.is_due)
        if len(state.within) > len(missing):
            advance(len(state.within) - len(missing))
        if not len(missing):
            continue
        chunks = [missing[i : i + ROWS_PER_JOB] for i in range(0, len(missing), ROWS_PER_JOB)]
        shard = unfinished.get(state.digest)  # two shards may have the same contents, and other rows of them be wanted
        if shard is None:
            known = store.read(state.digest) or ShardCounts.empty(0)
            shard = unfinished[state.digest] = _OpenShard(state.digest, known, 0)
        shard.counts = shard.counts.resized(int(state.within.max()) + 1)
        shard.num_left += len(chunks)
        for chunk in chunks:
            yield _Part(shard, (chunk + state.first_row).tolist(), state.within[chunk].tolist())


def _run(parts: Iterator[_Part], source: int, pool: Pool) -> Iterator[tuple[_Part, np.ndarray]]:
    """Yield parts with their counts [N, 3], in order; as many as the workers need are under way."""
    pending: deque[tuple[_Part, Any]] = deque()
    for part in parts:
        refs = tuple(SampleRef(source, row) for row in part.rows)
        pending.append((part, pool.submit(MicroBatchJob(0, 0, refs))))
        if len(pending) > _AHEAD * pool.num_workers:
            done, job = pending.popleft()
            yield done, job.result().inputs["counts"].numpy()
    while pending:
        done, job = pending.popleft()
        yield done, job.result().inputs["counts"].numpy()
