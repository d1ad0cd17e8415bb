"""Whose fault it was: what is known of a job whose workers died or hung, and what to do with it next.

A decoder in native code can take its process with it, or never come back. The first time its sample is a suspect, and
the job is done again elsewhere; then it is condemned, and the job is done without it. What comes from outside (a
scheduler's signal, a kill for want of memory, a storage that hangs) must not cost a sample its place.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from vlm_dist.data.types import Condemned, MicroBatchJob
from vlm_dist.data.workers.progress import Note, Phase

#: A job is done again after so many losses that no sample is to blame for; the last of them ends the run.
MAX_BLAMELESS_LOSSES = 3
#: What one job may lose to samples that crash or hang. The other ranks wait for 15 minutes at most.
MAX_LOST_SECONDS = 720.0
#: Reading one sample, or work between samples (collating, sending) that takes longer hangs.
STALL_SECONDS = 240.0

#: Sent from outside; no decoder does that.
_OUTSIDE = frozenset(
    {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM}
)
#: What multiprocessing tells of a process whose fork server has ended too, as after a signal to the process group.
_UNKNOWN_EXIT = 255


@dataclass(frozen=True, slots=True)
class Loss:
    """A worker that was lost in the middle of a job.

    Attributes:
        note: what it was at.
        exit_code: negative for a signal; None where it hung and was killed by its owner.
        seconds: since it was given the job.
    """

    note: Note
    exit_code: int | None
    seconds: float

    @property
    def blames_sample(self) -> bool:
        """Whether the sample that it was at may be the reason."""
        if self.note.slot is None:
            return False
        if self.exit_code is None:
            return self.note.phase is Phase.DECODING  # a read that hangs is the storage's fault
        return self.exit_code != _UNKNOWN_EXIT and -self.exit_code not in _OUTSIDE

    @property
    def is_kill(self) -> bool:
        """Whether it was killed outright: by somebody, or by the system for want of memory, as a huge picture may."""
        return self.exit_code == -signal.SIGKILL

    def __str__(self) -> str:
        if self.exit_code is None:
            return "did not come back"
        if self.exit_code >= 0:
            return f"ended with exit code {self.exit_code}"
        return f"died of signal {-self.exit_code}" + (", as when memory runs out" if self.is_kill else "")


@dataclass(slots=True)
class Case:
    """The losses of one job.

    Args:
        sample_timeout_seconds: how long a sample may be decoded.
    """

    sample_timeout_seconds: float
    strikes: dict[int, list[Loss]] = field(default_factory=dict)  # by slot
    num_blameless: int = 0
    lost_seconds: float = 0.0

    def add(self, loss: Loss) -> None:
        """Count one more loss."""
        self.lost_seconds += loss.seconds
        if loss.blames_sample:
            assert loss.note.slot is not None
            self.strikes.setdefault(loss.note.slot, []).append(loss)
        else:
            self.num_blameless += 1

    @property
    def condemned(self) -> list[int]:
        """Slots that are not tried any more: two strikes, or three where they may have been kills from outside."""
        return sorted(
            slot
            for slot, losses in self.strikes.items()
            if len(losses) >= 3 or sum(not loss.is_kill for loss in losses) >= 2
        )

    @property
    def is_hopeless(self) -> bool:
        """Whether the job has been tried often enough, or another time-out would take too long."""
        is_late = self.lost_seconds + self.sample_timeout_seconds > MAX_LOST_SECONDS
        return self.num_blameless >= MAX_BLAMELESS_LOSSES or is_late

    def next_job(self, job: MicroBatchJob) -> MicroBatchJob:
        """The job as it is to be tried next."""
        if not self.strikes:
            return job
        condemned = self.condemned
        return replace(
            job,
            condemned=tuple(Condemned(slot, *self._reason(slot)) for slot in condemned),
            suspects=tuple(sorted(set(self.strikes) - set(condemned))),
        )

    def limit_seconds(self, note: Note) -> float:
        """How long a worker may stay at what it is at."""
        if note.slot is None or note.phase is Phase.READING:
            return STALL_SECONDS
        return self.sample_timeout_seconds

    def tell(self, name: Callable[[int], str]) -> str:
        """The samples that workers were lost at, and how.

        Args:
            name: gives a slot's sample a name.
        """
        return "; ".join(
            f"{name(slot)} ({', '.join(map(str, losses))})" for slot, losses in sorted(self.strikes.items())
        )

    def _reason(self, slot: int) -> tuple[str, str]:
        """Null class and message of a condemned slot: a function of the sample, not of who ran when."""
        losses = self.strikes[slot]
        num_hangs = sum(loss.exit_code is None for loss in losses)
        signs = sorted({str(loss) for loss in losses if loss.exit_code is not None})
        said = []
        if num_hangs:
            said.append(f"took longer than {self.sample_timeout_seconds:g} s{_times(num_hangs)}")
        if signs:
            said.append(f"ended the worker process{_times(len(losses) - num_hangs)} ({'; '.join(signs)})")
        return ("timeout" if num_hangs == len(losses) else "crash"), "its decoding " + ", and ".join(said)


def _times(count: int) -> str:
    return {1: "", 2: " twice"}.get(count, f" {count} times")
