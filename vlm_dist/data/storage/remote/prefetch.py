"""Fetches in the background what is needed soon, the nearest first."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

_NUM_THREADS = 4
_END_SECONDS = 2.0


class ClosedError(Exception):
    """The process ends: what is being fetched is given up."""


class Prefetcher:
    """A few threads that work off a list of wishes, which is replaced as the run goes on.

    Args:
        fetch: fetches one thing; returns False to say that nothing more can be fetched for now.
    """

    def __init__(self, fetch: Callable[[int], bool]) -> None:
        self._fetch = fetch
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._wanted: list[int] = []
        self._under_way: set[int] = set()
        self._num_threads = 0
        self._is_closed = False
        atexit.register(_close, weakref.ref(self))

    def want(self, things: Sequence[int]) -> None:
        """Replace the list: what is not in it any more is not begun."""
        if self._pid != os.getpid():  # a fork has no threads, and perhaps a lock that nobody will free
            return
        with self._lock:
            self._wanted = [thing for thing in things if thing not in self._under_way]
            for _ in range(min(_NUM_THREADS, len(self._wanted)) - self._num_threads):
                self._num_threads += 1
                threading.Thread(target=self._work, name="shard-fetch", daemon=True).start()

    def check_open(self) -> None:
        """Give up what is being fetched when the process ends.

        Raises:
            ClosedError: it does.
        """
        if self._is_closed:
            raise ClosedError

    def close(self) -> None:
        """Begin nothing more, and give up what is under way."""
        self._is_closed = True
        with self._lock:
            self._wanted = []
        deadline = time.monotonic() + _END_SECONDS
        while self._num_threads and time.monotonic() < deadline:
            time.sleep(0.01)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._num_threads -= 1
                    return
                thing = self._wanted.pop(0)
                self._under_way.add(thing)
            goes_on = True
            try:
                goes_on = self._fetch(thing)
            except Exception as error:  # noqa: BLE001 - who needs it fetches it again, and tells
                log.debug("cannot fetch ahead: %s", error)
            with self._lock:
                self._under_way.discard(thing)
                if not goes_on:
                    self._wanted = []


def _close(reference: weakref.ref[Prefetcher]) -> None:
    prefetcher = reference()
    if prefetcher is not None and prefetcher._pid == os.getpid():
        prefetcher.close()
