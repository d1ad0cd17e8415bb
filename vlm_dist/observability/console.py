"""What a person sees: a live bar below the lines on a terminal, plain lines everywhere else."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vlm_dist.observability.metrics import StepMetrics, describe_evaluation, describe_step


class ConsoleLog:
    """Prints lines; on a terminal also keeps a progress bar with loss, throughput and remaining time below them.

    Args:
        stream: where to print; the standard output of the moment when None.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._bar: Progress | None = None
        self._console: Console | None = None
        # not rich's own test, which FORCE_COLOR turns on for a log file, too
        if (stream or sys.stdout).isatty() and os.environ.get("TERM") != "dumb":
            self._console = Console(file=stream, highlight=False, markup=False)

    def start(self, start_step: int, num_steps: int) -> None:
        """Show the bar.

        Args:
            start_step: optimizer updates that are done.
            num_steps: of the whole run.
        """
        if self._console is None:
            return
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self._console,
            # steps of large models take longer than the 30 s over which rich looks for progress by default
            speed_estimate_period=600,
        )
        self._task = self._bar.add_task("", total=num_steps, completed=start_step, figures="")
        self._bar.start()

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log_step(self, metrics: StepMetrics) -> None:
        """Print a line of figures and move the bar."""
        remaining = timedelta(seconds=round((metrics.num_steps - metrics.step) * metrics.step_seconds))
        line = describe_step(metrics)
        self.print(line if self._bar is not None else f"{line}  eta {remaining}")
        if self._bar is not None:
            loss = "-" if metrics.loss is None else f"{metrics.loss:.4f}"
            figures = f"loss {loss}  {metrics.tokens_per_second:,.0f} tokens/s"
            self._bar.update(self._task, completed=metrics.step, figures=figures)

    def log_eval(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Print a line of figures."""
        self.print(describe_evaluation(step, metrics))

    def print(self, text: str) -> None:
        """Print lines above the bar."""
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
        """Take the bar down; its last state stays on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
