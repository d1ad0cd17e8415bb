"""Python's collector of reference cycles, run at the same steps by all ranks.

Left to itself it runs when a process has made enough objects, on each rank at another moment, and goes through all that
the process has ever made. Every other rank waits for that one in the next collective: with many ranks, in every step.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


class GarbageCollection:
    """Python's own while it is not entered; within, one collection every so many steps.

    What is there at the start (modules, configuration, model) is set apart first: a collection then goes through what
    the loop has made alone, so that it can be a whole one, after which no cycle is left. Left, also by an exception, it
    has put everything back.

    Args:
        interval: steps between two collections; 0: Python's own all the time.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._was_enabled = False
        self._has_frozen = False

    def __enter__(self) -> GarbageCollection:
        if self._interval:
            self._was_enabled = gc.isenabled()
            gc.disable()
            gc.collect()
            self._has_frozen = gc.get_freeze_count() == 0  # what somebody else has frozen could not be told from ours
            if self._has_frozen:
                gc.freeze()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._interval:
            return
        if self._has_frozen:
            gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def step_done(self, position: int) -> None:
        """Collect where it is due.

        Args:
            position: number of steps that are done, the same on all ranks.
        """
        if self._interval and position % self._interval == 0:
            gc.collect()

    @contextmanager
    def left_to_python(self) -> Iterator[None]:
        """Something else than steps is done within: it may last, and make cycles of its own."""
        if not self._interval or not self._was_enabled:
            yield
            return
        gc.enable()
        try:
            yield
        finally:
            gc.disable()
