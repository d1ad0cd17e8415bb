"""What a person sees: a live line below the others on a terminal, plain lines everywhere else."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

from vlm_dist.observability.metrics import (
    StepMetrics,
    describe_evaluation,
    describe_step,
    describe_utilisation,
    figure,
)

if TYPE_CHECKING:
    from vlm_dist.observability.live_line import LiveLine


class ConsoleLog:
    """Prints lines; on a terminal also keeps one with loss, throughput and remaining time below them.

    Args:
        stream: where to print; the standard output of the moment when None.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._live: LiveLine | None = None
        self._console: Console | None = None
        # not rich's own test, which FORCE_COLOR turns on for a log file, too
        if (stream or sys.stdout).isatty() and os.environ.get("TERM") != "dumb":
            self._console = Console(file=stream, highlight=False, markup=False)

    def start(self, start_step: int, num_steps: int) -> None:
        """Show the live line.

        Args:
            start_step: optimizer updates that are done.
            num_steps: of the whole run.
        """
        if self._console is None:
            return
        from vlm_dist.observability.live_line import LiveLine

        self._live = LiveLine(self._console, start_step, num_steps)

    def advance(self, step: int, eta_seconds: float | None = None) -> None:
        """Move the bar."""
        if self._live is not None:
            self._live.update(step, eta_seconds)

    def log_step(self, metrics: StepMetrics) -> None:
        """Print a line of figures and move the bar."""
        from vlm_dist.observability.live_line import format_duration

        line = describe_step(metrics)
        if self._live is None and metrics.eta_seconds is not None:
            line += f"  eta {format_duration(metrics.eta_seconds)}"
        self.print(line)
        if self._live is not None:
            figures = [f"loss {figure(metrics.loss, '.4f')}", f"{metrics.tokens_per_second:,.0f} tokens/s"]
            if (speed := describe_utilisation(metrics)) is not None:
                figures.append(speed)
            figures.append(f"lr {metrics.learning_rate:.2e}")
            self._live.update(metrics.step, metrics.eta_seconds, figures)

    def log_eval(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Print a line of figures."""
        self.print(describe_evaluation(step, metrics))

    def print(self, text: str) -> None:
        """Print lines above the live one."""
        with contextlib.suppress(BrokenPipeError):  # nobody reads any more; training goes on to its checkpoint
            self._print(text)

    def _print(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, soft_wrap=True)
            return
        stream = self._stream or sys.stdout
        # one write per line: several processes often share one log file
        now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
        for line in text.splitlines() or [""]:
            stream.write(f"{now}  {line}\n")
        stream.flush()

    def close(self) -> None:
        """Take the live line down; its last state stays on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None
