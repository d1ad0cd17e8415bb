"""What a loader is asked to do, and what it has to offer: the seam between the bench and the loaders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

BATCH_SIZE = 8  # samples per forward pass
GLOBAL_BATCH_SIZE = 64  # samples per optimizer step, where a loader knows of steps
DECODED_SIDE = 448  # pixels
SEED = 7


@dataclass(frozen=True, slots=True)
class Task:
    """One measurement.

    Attributes:
        pictures: folder of the set: `tar/` has the shards, each peer keeps its own form beside it.
        num_samples: of the set.
        processor: directory of the processor.
        seconds: how long to measure, at least.
        num_workers: worker processes.
        start: samples that the run has seen before (resume).
        limit: samples to read (memory).
    """

    pictures: str
    num_samples: int
    processor: str
    seconds: float = 1.0
    num_workers: int = 0
    start: int = 0
    limit: int = 0

    @property
    def folder(self) -> Path:
        """Of the set."""
        return Path(self.pictures)

    @property
    def tars(self) -> list[str]:
        """Paths of the shards."""
        return sorted(str(path) for path in (self.folder / "tar").glob("*.tar"))


class Loader(Protocol):
    """A module of `tests.bench.data.loaders`: imports all that it needs at its top."""

    def prepare(self, task: Task) -> None:
        """Convert the shards into the loader's own best form; once per set."""

    def raw(self, task: Task) -> Iterator[int]:
        """Read epoch after epoch, every member as bytes, nothing parsed; gives the size of each sample's members.

        In training order, unless the loader is faster in another.
        """

    def decoded(self, task: Task) -> Iterator[Any]:
        """Read, decode and resize to a square of `DECODED_SIDE`, one epoch or more."""

    def batches(self, task: Task) -> Iterator[Any]:
        """Make training batches of `BATCH_SIZE`, one epoch or more, from sample `task.start` on."""
