"""Work of some ranks that takes as long as it takes, while the others wait for it.

A collective has a deadline, which ends good work that takes longer. So the ranks meet again and again, every few
seconds: those that are done wait in a meeting, a rank that still works comes to each from a thread of its own. A rank
that dies breaks the next meeting, one that is frozen as a whole makes it run into the deadline, and one that fails
tells so in it; then all leave.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self

from vlm_dist.distributed.failures import Failure, describe_failure, raise_first
from vlm_dist.distributed.group import LostPeerError, Ranks
from vlm_dist.distributed.signals import AskedToStop, describe_stop

#: Between two meetings.
MEETING_SECONDS = 5.0
#: Between two lines that tell whom all are waiting for.
LINE_SECONDS = 60.0

_MAX_NAMED = 4
#: Ends the work of this rank, also where it waits for the system, when another has failed.
_LEAVE_SIGNAL = signal.SIGUSR2

log = logging.getLogger(__name__)


class Work:
    """What a rank is at, for those who wait; may be changed as it goes on."""

    def __init__(self, doing: str) -> None:
        self.doing = doing


@contextmanager
def long_work(ranks: Ranks, doing: str, *, leaves_if_asked: bool = False) -> Iterator[Work]:
    """Wait for the enclosed local work of all ranks, however long it takes, and raise on all if it failed on any.

    Collective: every rank enters and leaves it. The enclosed work must not contain collectives. Rank 0 logs once a
    minute what is waited for. Where a rank fails while others still work, those are interrupted.

    Args:
        ranks: this process among its peers.
        doing: what the others are told, such as "opening data.train".
        leaves_if_asked: the work is given up on all ranks, too, if any was asked to stop.

    Raises:
        VlmDistError: the first failing rank's error.
        AskedToStop: on every rank, with `leaves_if_asked`.
        LostPeerError: a rank is gone, or does not answer for as long as a collective may take.
    """
    work = Work(doing)
    failure: Exception | None = None
    meetings = _Meetings(ranks, work, leaves_if_asked)
    before = ranks.progress.mark
    ranks.progress.at(doing)  # it has no limit, and a watch of its own
    try:
        with meetings:
            yield work
    except _LeaveError:
        why = describe_stop(meetings.asked) if meetings.asked else "another rank has failed"
        log.warning("%s is given up: %s", work.doing, why)
    except Exception as error:  # noqa: BLE001 - re-raised below, after the others know
        failure = error
    raise_first(ranks, meetings.end(failure), failure)
    ranks.progress.at(before.phase, samples=before.samples)
    if meetings.asked:
        raise AskedToStop(describe_stop(meetings.asked))


@dataclass(frozen=True)
class _Word:
    """What a rank says in a meeting: what it is at (None: it is done), or how it failed."""

    doing: str | None = None
    failure: Failure | None = None
    asked: int = 0  # to stop, by this signal


class _LeaveError(BaseException):
    """Raised in the midst of work that nobody waits for any more."""


class _Meetings:
    """Meetings of all ranks; attended by a thread while the block's work lasts, afterwards by `end`."""

    def __init__(self, ranks: Ranks, work: Work, leaves_if_asked: bool) -> None:
        self._ranks = ranks
        self._work = work
        self._leaves_if_asked = leaves_if_asked
        self._start = self._last_line = time.monotonic()
        self._is_working = False
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._words: Sequence[_Word] = ()  # of the last meeting
        self._broken: RuntimeError | None = None
        self._thread = threading.Thread(target=self._attend, name="meetings", daemon=True)
        self._old_handler: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(_LEAVE_SIGNAL, self._leave)
        self._is_working = True
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._is_working = False
        self._ended.set()
        if self._old_handler is not None:
            signal.signal(_LEAVE_SIGNAL, self._old_handler)

    @property
    def asked(self) -> list[int]:
        """The signals that ask to stop, by rank, as of the last meeting; empty: there is no reason to leave."""
        asked = [word.asked for word in self._words]
        return asked if any(asked) else []

    def end(self, failure: Exception | None) -> list[Failure | None]:
        """Wait until all ranks are done or one has failed; gives back how."""
        self._thread.join()
        word = self._word(failure=describe_failure(failure))
        while self._broken is None and not self._is_over():
            self._meet(word)
        if self._broken is not None:
            raise LostPeerError(
                f"while waiting for {self._waited_for()}: a rank is gone or does not answer (its own message is above, "
                f"or on its node): {str(self._broken).splitlines()[0]}"
            ) from self._broken
        return [word.failure for word in self._words]

    def _attend(self) -> None:
        while not self._ended.wait(MEETING_SECONDS):
            self._meet(self._word(doing=self._work.doing))
            if self._broken is not None or self._is_over():
                self._interrupt()
                return

    def _word(self, doing: str | None = None, failure: Failure | None = None) -> _Word:
        return _Word(doing, failure, self._ranks.stop.number if self._leaves_if_asked else 0)

    def _meet(self, word: _Word) -> None:
        try:
            self._words = self._ranks.gather_objects(word) if self._ranks.world_size > 1 else [word]
        except RuntimeError as error:
            self._broken = error
            return
        now = time.monotonic()
        if self._ranks.is_main and not self._is_over() and now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            log.info("waiting for %s, %.0f min so far", self._waited_for(), (now - self._start) / 60)

    def _is_over(self) -> bool:
        """Whether the last meeting was the last: all are done, one has failed or was asked to stop."""
        if not self._words:
            return False
        if any(word.failure or word.asked for word in self._words):
            return True
        return not any(word.doing for word in self._words)

    def _waited_for(self) -> str:
        busy = [rank for rank, word in enumerate(self._words) if word.doing is not None]
        if not busy:
            return f"all ranks ({self._work.doing})"
        more = f" and {len(busy) - _MAX_NAMED} more" if len(busy) > _MAX_NAMED else ""
        numbers = ", ".join(map(str, busy[:_MAX_NAMED])) + more
        return f"rank{'s' if len(busy) > 1 else ''} {numbers} ({self._words[busy[0]].doing})"

    def _interrupt(self) -> None:
        with self._lock:  # nothing is sent when the work is over
            if self._is_working and self._old_handler is not None:
                signal.pthread_kill(threading.main_thread().ident or 0, _LEAVE_SIGNAL)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        if self._is_working:
            raise _LeaveError
