"""Requests to stop: a signal sets a flag, and all ranks agree on the flag before they leave.

A handler does nothing else, because a rank that saved and left by itself would leave the others waiting. Python runs
handlers in the main thread, and only when that is not inside a collective or a decoder: so a thread of its own hears of
signals, too, through the descriptor that the interpreter's C handler writes to.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from types import FrameType

from vlm_dist.errors import ExitCode

#: SIGTERM: Slurm's requeue and most supervisors. SIGUSR1: Slurm's warning before the time limit. SIGINT: Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

#: How long the main thread has to end by itself after the second Ctrl-C.
SECOND_CTRL_C_SECONDS = 3.0
#: How long a process that was asked to stop waits for the others to come to the meeting point.
RENDEZVOUS_SECONDS = 15.0

log = logging.getLogger(__name__)


#: What a second Ctrl-C says.
AT_ONCE = "stopped at once, as asked twice; a checkpoint that was being written is not there, older ones are whole"


class AskedToStop(Exception):  # noqa: N818 - not an error: all ranks leave together, and may be started again
    """Raised on all ranks at the same point, as one of them was asked to stop."""


class StopRequest:
    """Whether this process was asked to stop, and by what."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._num_interrupts = 0  # as the main thread has seen them
        self._ears: socket.socket | None = None
        self._has_met = False
        self._is_told = False

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def number(self) -> int:
        """The signal, for a vote; 0: none."""
        return 0 if self.signal is None else int(self.signal)

    def install(self) -> None:
        """Listen to the signals; a second Ctrl-C stops at once. To be called in the main thread, once."""
        self._ears, mouth = socket.socketpair()
        mouth.setblocking(False)
        signal.set_wakeup_fd(mouth.detach(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # kept back by a launcher until somebody listens
        threading.Thread(target=self._listen, args=(self._ears,), name="signals", daemon=True).start()

    def ask(self, why: str) -> None:
        """Ask this process to stop, as SIGTERM would; for a thread that knows a reason."""
        if self.signal is None:
            self.signal = signal.SIGTERM
            _say(f"{why}: saving a checkpoint, then stopping")

    def met(self) -> None:
        """Say that the ranks have found each other: from now on they agree before they leave."""
        self._has_met = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        if number == signal.SIGINT:
            self._num_interrupts += 1
            if self._num_interrupts > 1:
                raise KeyboardInterrupt

    def _listen(self, ears: socket.socket) -> None:
        """Run in the thread: hear of a signal, even where the main thread cannot."""
        num_interrupts = 0
        while True:
            for number in ears.recv(64):
                if number not in STOP_SIGNALS:
                    continue
                self._hear(signal.Signals(number))
                num_interrupts += number == signal.SIGINT
                if number == signal.SIGINT and num_interrupts == 2:
                    threading.Timer(SECOND_CTRL_C_SECONDS, _end_at_once).start()

    def _hear(self, heard: signal.Signals) -> None:
        self.signal = self.signal or heard
        if self._is_told:
            return
        self._is_told = True
        if not self._has_met:
            timer = threading.Timer(RENDEZVOUS_SECONDS, self._leave_alone)
            timer.daemon = True
            timer.start()
        if os.environ.get("RANK", "0") == "0" and os.environ.get("SLURM_PROCID", "0") == "0":
            again = "; once more stops at once" if heard is signal.SIGINT else ""
            _say(f"{_NAMES[heard]}: saving a checkpoint, then stopping (at the next agreed point){again}")

    def _leave_alone(self) -> None:
        """There is nothing to save, and somebody is not there to agree with."""
        if not self._has_met:
            _say("stopped by a signal at start-up, before the processes had met; there is nothing to save")
            os._exit(int(ExitCode.PREEMPTED))


_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1", signal.SIGINT: "Ctrl-C"}


def describe_stop(numbers: Sequence[int]) -> str:
    """Who was asked to stop, such as "SIGUSR1 to rank 1".

    Args:
        numbers: `StopRequest.number` by rank.
    """
    asked = [rank for rank, number in enumerate(numbers) if number]
    if not asked:
        return "nobody was asked"
    name = _NAMES.get(signal.Signals(numbers[asked[0]]), "a signal")
    if len(asked) == len(numbers):
        return name if len(numbers) == 1 else f"{name} to all ranks"
    return f"{name} to rank {asked[0]}" + (f" and {len(asked) - 1} more" if len(asked) > 1 else "")


def _end_at_once() -> None:
    _say(AT_ONCE)
    os._exit(128 + signal.SIGINT)


def _say(text: str) -> None:
    """Tell the user from a thread; a terminal that is gone must not end it."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
