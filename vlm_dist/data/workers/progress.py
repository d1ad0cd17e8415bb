"""What a data worker is at, for its owner to read: a few integers in shared memory, no messages.

A decoder that crashes or hangs cannot tell anybody. So the worker notes each sample before it touches it (two stores,
less than a microsecond), and the owner reads the note when the worker has died, or when its time is over.
"""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray


class Phase(enum.IntEnum):
    """What is done to the sample."""

    READING = 0  # waits for storage, which has its own retries and may be slow without being broken
    DECODING = 1  # decoding, rendering, encoding: a matter of seconds


@dataclass(frozen=True, slots=True)
class Note:
    """What a worker was at when its owner looked.

    Attributes:
        slot: of the job's samples; None: between samples (it waits, collates, or sends).
        phase: what is done to that sample.
        since: monotonic seconds, the same clock in all processes of a machine.
    """

    slot: int | None
    phase: Phase
    since: float


_STATE, _SINCE, _MEMORY = range(3)
_BETWEEN = -1


class Board:
    """Where one worker writes and its owner reads; travels to the worker when that is started."""

    def __init__(self) -> None:
        self._values = RawArray("q", 3)
        self._values[_STATE] = _BETWEEN

    def write(self, state: int) -> None:
        """Note what is begun now."""
        # the time first: with a new state and an old time a worker would seem to be late
        self._values[_SINCE] = time.monotonic_ns()
        self._values[_STATE] = state

    def read(self) -> Note:
        """What the worker is at."""
        state, since = self._values[_STATE], self._values[_SINCE] / 1e9
        if state == _BETWEEN:
            return Note(None, Phase.READING, since)
        return Note(state // 2, Phase(state % 2), since)

    @property
    def memory_bytes(self) -> int:
        """The worker's own memory after its last job; 0 before the first."""
        return int(self._values[_MEMORY])

    @memory_bytes.setter
    def memory_bytes(self, value: int) -> None:
        self._values[_MEMORY] = value


_board: Board | None = None  # of this process, if it is a worker


def attach(board: Board) -> None:
    """Write to this board from now on."""
    global _board
    _board = board


def reading(slot: int) -> None:
    """Note that the sample in this slot of the job is being read."""
    if _board is not None:
        _board.write(2 * slot + Phase.READING)


def decoding(slot: int) -> None:
    """Note that the sample in this slot of the job has been read and is being decoded."""
    if _board is not None:
        _board.write(2 * slot + Phase.DECODING)


def between_samples() -> None:
    """Note that no sample is being worked on."""
    if _board is not None:
        _board.write(_BETWEEN)
