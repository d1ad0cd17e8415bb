"""What the commands share that several ranks run: signals, one clear message, and an end with the right exit code."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from vlm_dist.distributed.signals import AT_ONCE, StopRequest
from vlm_dist.errors import ExitCode, VlmDistError

#: How long a rank other than 0 keeps quiet with an error, so that rank 0 tells it first.
QUIET_SECONDS = 10


def guarded(work: Callable[[StopRequest], int]) -> int:
    """Do a command's work; gives back the exit code (see `vlm_dist.errors.ExitCode`).

    Args:
        work: imports what takes seconds itself: signals are heard before.
    """
    stop = StopRequest()
    stop.install()
    try:
        return work(stop)
    except VlmDistError as error:
        tell(error, is_ended=stop.signal is signal.SIGTERM)
        return int(error.exit_code)
    except KeyboardInterrupt:
        print(AT_ONCE, file=sys.stderr, flush=True)  # noqa: T201
        return 128 + signal.SIGINT


def settle_environment() -> None:
    """Set what the launcher has left open; before torch is imported, which reads some of it then."""
    from vlm_dist.distributed.environment import resolve_topology
    from vlm_dist.distributed.process_settings import settle

    topology = resolve_topology(os.environ)
    for line in settle(os.environ, topology):
        if topology.local_rank == 0:
            print(f"notice: {line}", file=sys.stderr, flush=True)  # noqa: T201


def tell(error: VlmDistError, *, is_ended: bool = False) -> None:
    """Print an error once for all ranks that share it.

    A launcher that loses a rank ends the others. So rank 0 speaks, and another rank speaks only if it has not been
    ended by then: the error was its own.

    Args:
        error: what to tell.
        is_ended: this process has had SIGTERM already.
    """
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank == "0" or not rank.isdigit():  # not a number: that is what the error is about
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if not is_ended and signal.sigtimedwait({signal.SIGTERM}, QUIET_SECONDS) is None:
        print(f"error (rank {rank}): {error}", file=sys.stderr, flush=True)  # noqa: T201


def run(main: Callable[[], int]) -> NoReturn:
    """Be the command: whatever escapes is printed, and the process ends with its exit code.

    Args:
        main: of the module that `python -m` has started.
    """
    own_file = main.__code__.co_filename
    try:
        code = main()
    except Exception:
        if not _is_alone(own_file):
            raise  # a debugger shows where
        traceback.print_exc()
        code = int(ExitCode.FAILURE)
    leave(code, own_file)


def _is_alone(own_file: str) -> bool:
    """Whether nothing is on the stack but `python -m`: no debugger, no profiler."""
    frame = sys._getframe()
    while frame.f_code.co_filename in (__file__, own_file, "<frozen runpy>"):
        if frame.f_back is None:
            return True
        frame = frame.f_back
    return False


def leave(code: int, own_file: str = __file__) -> NoReturn:
    """End the process with this exit code, whatever threads torch has left behind.

    Taking the interpreter apart would kill a thread of gloo that asks for the GIL meanwhile, and with it, now and then,
    the process: "terminate called without an active exception", and SIGABRT in the place of our exit code.

    Args:
        code: for the shell.
        own_file: of the module that `python -m` has started.
    """
    if not _is_alone(own_file):
        sys.exit(code)  # a debugger or a profiler has the last word
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
