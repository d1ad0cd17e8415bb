"""The one line at the bottom of a terminal: how far, how good, how fast, how long still."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment

_REFRESHES_PER_SECOND = 2
_MAX_BAR_WIDTH = 40
_MIN_BAR_WIDTH = 6


class LiveLine:
    """A bar with figures, never wider than the terminal: what has no room is left out, the last figures first.

    Args:
        console: of the terminal.
        start_step: optimizer updates that are done.
        num_steps: of the whole run.
    """

    def __init__(self, console: Console, start_step: int, num_steps: int) -> None:
        self._step = start_step
        self._num_steps = num_steps
        self._figures: Sequence[str] = ()
        self._end: float | None = None
        self._live = Live(self, console=console, refresh_per_second=_REFRESHES_PER_SECOND)
        self._live.start()

    def update(self, step: int, eta_seconds: float | None = None, figures: Sequence[str] | None = None) -> None:
        """Show a later state; the time that is left goes on running down by itself.

        Args:
            step: optimizer updates that are done.
            eta_seconds: until the run ends; None: unknown.
            figures: the most telling first; None: those of before.
        """
        self._step = step
        self._end = None if eta_seconds is None else time.monotonic() + eta_seconds
        if figures is not None:
            self._figures = figures

    def stop(self) -> None:
        """Leave the line as it is."""
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.max_width
        left = "-" if self._end is None else format_duration(self._end - time.monotonic())
        parts = [f"{self._step}/{self._num_steps}", f"eta {left}"]
        for figure in self._figures:
            if len("  ".join([*parts, figure])) + _MIN_BAR_WIDTH + 2 > room:
                break
            parts.insert(-1, figure)
        text = "  ".join(parts)
        bar_width = min(_MAX_BAR_WIDTH, room - len(text) - 2)
        if bar_width >= _MIN_BAR_WIDTH:
            bar = ProgressBar(total=self._num_steps, completed=self._step, width=bar_width)
            yield from console.render(bar, options.update(width=bar_width))
            yield Segment("  ")
        yield Segment(text[:room])
        yield Segment.line()


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds: `1:02:03`, or `2 days, 1:02:03`."""
    return str(timedelta(seconds=round(max(0.0, seconds))))
