"""Requests to stop: a signal sets a flag, and the flag is agreed upon with the step.

A handler does nothing else, because a rank that saved and left by itself would leave the others waiting.
"""

from __future__ import annotations

import signal
from types import FrameType

#: SIGTERM: Slurm's requeue and most supervisors. SIGUSR1: Slurm's warning before the time limit. SIGINT: Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop, and by what."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def install(self) -> None:
        """Listen to the signals; a second Ctrl-C stops at once."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
