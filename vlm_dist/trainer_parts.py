"""What the loop goes by, and what it needs of the parts that it is given."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from vlm_dist.data.types import MicroBatch, StepPlan


class Ending(enum.Enum):
    """Why the loop ended."""

    COMPLETE = "complete"
    STOPPED_AT = "stopped, as stop_at_step says,"
    PREEMPTED = "stopped by a signal"


@dataclass(frozen=True)
class Cadence:
    """When things happen, in steps; 0 is never."""

    num_steps: int
    logging_steps: int
    eval_steps: int
    save_steps: int
    stop_at_step: int | None = None
    eval_on_start: bool = False

    @property
    def last_step(self) -> int:
        """The position at which this run ends, though the schedule may go on."""
        return min(self.num_steps, self.stop_at_step or self.num_steps)

    def due(self, position: int, interval: int) -> bool:
        """Whether something done every `interval` steps, and at the very end of training, is due."""
        return interval > 0 and (position % interval == 0 or position == self.num_steps)


@dataclass(frozen=True)
class Owed:
    """What a resumed run has to do at the position where it starts; the same on all ranks.

    Attributes:
        save: the checkpoint is not among those of this run: one that ended before its first own save could not resume.
        evaluation: the run before has saved there, and ended before it had evaluated.
    """

    save: bool = False
    evaluation: bool = False


NOTHING_OWED = Owed()


class Evaluates(Protocol):
    """What the loop needs of an evaluator."""

    def run(self, position: int) -> Mapping[str, float]:
        """Evaluate at a position. Collective: every rank calls this."""


class LosesPatience(Protocol):
    """What the loop needs of early stopping; the same on every rank, and its text is why the run is over."""

    def hear(self, position: int, figures: Mapping[str, float]) -> None:
        """Hear of an evaluation."""

    @property
    def is_over(self) -> bool:
        """Whether the run is to end now."""


class Saves(Protocol):
    """What the loop needs of what saves; it writes while the loop goes on."""

    def begin(self, position: int) -> None:
        """Collect a checkpoint of a position, and have it written. Collective: every rank calls this."""

    def evaluated(self, position: int, figures: Mapping[str, float]) -> None:
        """Hear of an evaluation. Every rank calls this."""

    def finish(self) -> None:
        """Wait until all is written; raise on all ranks if it cannot be. Collective: every rank calls this."""

    def settle(self) -> None:
        """Tell all ranks what could not be written, and raise on all where it counts. Collective."""


class Records(Protocol):
    """What the loop needs of a sample ledger."""

    def record(self, plan: StepPlan, micro_batches: Sequence[MicroBatch], *, is_applied: bool) -> None:
        """Write down what was in a step, after its update."""


class Profiles(Protocol):
    """What the loop needs of something that looks at steps as they run."""

    def __call__(self, position: int) -> AbstractContextManager[None]:
        """Look at a step, the so-many-th from 1."""


def unprofiled(position: int) -> AbstractContextManager[None]:
    """Let it run as it is."""
    return nullcontext()


class Explains(Protocol):
    """What the loop needs of something that knows why memory runs out."""

    def __call__(self, doing: str, micro_batch: MicroBatch | None = None) -> AbstractContextManager[None]:
        """Explain what goes wrong within."""


def unexplained(doing: str, micro_batch: MicroBatch | None = None) -> AbstractContextManager[None]:
    """Let it go wrong as it is."""
    return nullcontext()
