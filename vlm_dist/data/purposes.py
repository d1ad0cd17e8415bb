"""One pool of workers for training, evaluation and generation: each worker has a materialiser for each purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from vlm_dist.data.types import MicroBatch, MicroBatchJob

Purpose = Literal["train", "eval", "generate"]


@dataclass(frozen=True)
class ByPurpose:
    """Hands a job to the materialiser of its purpose; picklable if they are."""

    materialisers: Mapping[Purpose, Callable[[MicroBatchJob], MicroBatch]]

    def __call__(self, job: MicroBatchJob) -> MicroBatch:
        """Make the micro-batch."""
        return self.materialisers[job.purpose](job)

    def name_samples(self, job: MicroBatchJob) -> list[str]:
        """Name a job's samples, for messages."""
        names: list[str] = getattr(self.materialisers[job.purpose], "name_samples", lambda job: [])(job)
        return names


class Submits(Protocol):
    """A pool of workers."""

    def submit(self, job: MicroBatchJob) -> Any:
        """Something whose `result()` is the job's `MicroBatch`."""


@dataclass(frozen=True)
class PurposePool:
    """A pool as seen by one purpose: whoever submits here need not know of the others."""

    pool: Submits
    purpose: Purpose

    def submit(self, job: MicroBatchJob) -> Any:
        """Something whose `result()` is the job's `MicroBatch`."""
        return self.pool.submit(replace(job, purpose=self.purpose))
