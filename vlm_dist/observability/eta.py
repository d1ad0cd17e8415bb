"""When a run will be done, from the steps, evaluations and saves that it has seen."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

#: Steps that the mean time of a step is taken over.
WINDOW_STEPS = 100

Pause = Literal["evaluation", "save", "profile"]


class Eta:
    """Time that is left until the last step of this run.

    The mean of the last steps, times the steps that are left; and for each evaluation and each save that is still to
    come, what the last one took. The first step of a start, which allocates, compiles and fills queues, is forgotten
    as soon as there are others; nothing is taken over from the start before, whose machines may have been others.

    Args:
        start: steps that are done already.
        last_step: at which this run ends.
        eval_steps: steps between two evaluations; 0 is never.
        save_steps: steps between two saves; 0 is never.
    """

    def __init__(self, start: int, last_step: int, eval_steps: int = 0, save_steps: int = 0) -> None:
        self._last_step = last_step
        self._intervals: dict[Pause, int] = {"evaluation": eval_steps, "save": save_steps}
        self._position = start
        self._is_first = True
        self._steps: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._pauses: dict[Pause, float] = {}
        self._mark = time.perf_counter()

    def restart_clock(self) -> None:
        """What was until now is no part of the next step."""
        self._mark = time.perf_counter()

    def step_done(self, position: int) -> None:
        """A step has ended; what passed since the last one, but for pauses, was its time."""
        now = time.perf_counter()
        if len(self._steps) == 1 and self._is_first:
            self._steps.clear()
            self._is_first = False
        self._steps.append(now - self._mark)
        self._mark = now
        self._position = position

    @contextmanager
    def pause(self, kind: Pause) -> Iterator[None]:
        """Something else than steps is done within."""
        started = time.perf_counter()
        yield
        took = time.perf_counter() - started
        self._mark += took
        self._pauses[kind] = took

    def seconds_left(self) -> float | None:
        """Until this run ends; None before its first step."""
        if not self._steps:
            return None
        seconds = (self._last_step - self._position) * sum(self._steps) / len(self._steps)
        for kind, took in self._pauses.items():
            interval = self._intervals.get(kind, 0)
            if interval and self._position < self._last_step:
                # each multiple of the interval, and the end
                due = self._last_step // interval - self._position // interval + (self._last_step % interval > 0)
                seconds += took * due
        return max(0.0, seconds)
