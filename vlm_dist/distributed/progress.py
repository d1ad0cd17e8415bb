"""What this process is at: set by the loop, read by whoever has to tell.

Setting it is one assignment; no clock is read, no device is waited for. Who watches notices that it has changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

#: So many samples are named.
NUM_NAMED = 4

#: Phases of which none may take longer than the hang time-out; all others wait for something with a limit of its own.
WATCHED = frozenset({"data wait", "forward", "backward", "step", "evaluation", "generation", "saving", "reporting"})


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in the run.

    Attributes:
        count: marks before it; ranks make the same marks in the same order.
        step: steps that are done.
        phase: such as "forward".
        samples: `SampleOrigin`s of the micro-batch, where there is one.
    """

    count: int = 0
    step: int = -1
    phase: str = "start-up"
    samples: Sequence[Any] = ()

    @property
    def is_watched(self) -> bool:
        """Whether it may last only so long."""
        return self.phase in WATCHED

    def named_samples(self) -> list[str]:
        """The first few samples, in words."""
        return [str(sample) for sample in self.samples[:NUM_NAMED]]

    def __str__(self) -> str:
        return describe_place(self.step, self.phase, self.named_samples(), len(self.samples))


def describe_place(step: int, phase: str, samples: Sequence[str], num_samples: int | None = None) -> str:
    """A place in words, such as "step 7, forward, samples images/a.tar:0001"."""
    where = f"step {step}, {phase}" if step >= 0 else phase
    if not samples:
        return where
    total = len(samples) if num_samples is None else num_samples
    more = f" and {total - len(samples)} more" if total > len(samples) else ""
    return f"{where}, samples {', '.join(samples)}{more}"


class Progress:
    """The newest mark of this process.

    Attributes:
        mark: where it is.
        known_phases: those that it has been through; a first use may take longer than the others. Noted here and not
            by who watches, since most phases come and go between two of its looks.
        is_leaving: the run is being taken apart, whatever the reason; the mark stays where it ended.
    """

    def __init__(self) -> None:
        self.mark = Mark()
        self.is_leaving = False
        self.known_phases: set[str] = set()
        self._step_file = StepFile.from_environment()

    def at(self, phase: str, step: int | None = None, samples: Sequence[Any] = ()) -> None:
        """Say what comes now.

        Args:
            phase: one of `WATCHED`, or what else it is.
            step: steps that are done; None: as before.
            samples: of the micro-batch.
        """
        before = self.mark
        if step is not None and step != before.step and self._step_file is not None:
            self._step_file.write(step)
        self.known_phases.add(before.phase)
        self.mark = Mark(before.count + 1, before.step if step is None else step, phase, samples)

    @contextmanager
    def until_leaving(self) -> Iterator[None]:
        """Note when the enclosed part of the run has ended, well or not."""
        try:
            yield
        finally:
            self.is_leaving = True


#: Names a directory in which each rank leaves how far it came, for a supervisor that restarts the ranks.
STEP_DIRECTORY = "VLM_DIST_STEP_DIRECTORY"


class StepFile:
    """Eight bytes that survive this process: the steps that are done, little endian."""

    def __init__(self, path: str) -> None:
        import mmap

        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.pwrite(handle, (-1).to_bytes(8, "little", signed=True), 0)
            self._map = mmap.mmap(handle, 8)
        finally:
            os.close(handle)

    @classmethod
    def from_environment(cls) -> StepFile | None:
        """The file that a supervisor has asked for, if one has."""
        directory = os.environ.get(STEP_DIRECTORY)
        return cls(f"{directory}/step-{os.environ.get('RANK', '0')}") if directory else None

    def write(self, step: int) -> None:
        """Note the steps that are done."""
        self._map[:8] = step.to_bytes(8, "little", signed=True)
