"""Run one command to its end, and be in its place for whoever sends signals and reads exit codes."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from types import FrameType

from launcher.lifeline import STOP_SIGNALS, end_with_parent


def run_in_foreground(
    command: Sequence[str],
    environment: Mapping[str, str],
    standard_input: str | None = None,
    translated: Mapping[int, int] | None = None,
) -> int:
    """Start a command and wait for it; requests to stop are handed to it alone, by its process id.

    It gets a session of its own: Ctrl-C would reach it and all its children from the terminal, and then again from
    here, which the trainer takes for the second one, to stop without a checkpoint.

    Args:
        command: and its arguments.
        environment: all of it.
        standard_input: what it reads; None: what we would read.
        translated: signal -> what the command is sent in its place.

    Returns:
        Its exit code; 128 + the number of the signal that killed it.
    """
    early: list[int] = []
    child: subprocess.Popen[str] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        if child is None:
            early.append(number)
        else:
            child.send_signal((translated or {}).get(number, number))  # does nothing when it has ended

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        child = subprocess.Popen(  # noqa: S603
            command,
            env=dict(environment),
            stdin=None if standard_input is None else subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=functools.partial(end_with_parent, signal.SIGTERM, os.getpid()),
        )
        for number in early:
            pass_on(number, None)
        if standard_input is not None:
            child.communicate(standard_input)
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code
