"""Work that a damaged file may bring down or hold up: done in a child process, piece by piece."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from vlm_dist.errors import SkipSample

#: To begin with: the first sample may open files over a network.
_START_SECONDS = 60.0


@dataclass(frozen=True)
class Lost:
    """A piece of work that did not come to an end.

    Attributes:
        message: what became of the child.
    """

    message: str


def run_in_child(pieces: Sequence[Callable[[], Any]], seconds: float) -> list[Any]:
    """Do pieces of work in a forked child; a piece that kills or stops it costs that piece alone.

    Args:
        pieces: what they give has to be picklable.
        seconds: that one may take.

    Returns:
        What each gave, the `Exception` that it raised, or `Lost`.
    """
    outcomes: list[Any] = []
    while len(outcomes) < len(pieces):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        # forked: what is read is open already, and nothing is imported again
        child = multiprocessing.get_context("fork").Process(
            target=_work, args=(pieces[len(outcomes) :], theirs), daemon=True
        )
        child.start()
        theirs.close()
        patience = seconds + _START_SECONDS
        while len(outcomes) < len(pieces):
            try:
                if not ours.poll(patience):
                    outcomes.append(Lost(f"timeout: it took longer than {seconds:g} s"))
                    break
                outcomes.append(_raised(ours.recv()))
            except EOFError:
                child.join(5)
                outcomes.append(Lost(f"crash: its decoder ended the process ({_ending(child.exitcode)})"))
                break
            patience = seconds
        child.kill()
        child.join()
        ours.close()
    return outcomes


def _work(pieces: Sequence[Callable[[], Any]], told: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for piece in pieces:
        try:
            told.send((True, piece()))
        except SkipSample as skip:  # its arguments are not those of Exception
            told.send((False, (skip.null_class, skip.message)))
        except Exception as error:  # noqa: BLE001 - told by the parent
            told.send((False, error))


def _raised(told: tuple[bool, Any]) -> Any:
    is_done, what = told
    if not is_done and isinstance(what, tuple):
        return SkipSample(*what)
    return what


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    return signal.Signals(-code).name
