"""The one place that the loop reports to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from vlm_dist.errors import ConfigError
from vlm_dist.observability.console import ConsoleLog
from vlm_dist.observability.jsonl import JsonLines
from vlm_dist.observability.metrics import StepMetrics
from vlm_dist.observability.wandb_sink import WandbSink

SERVICES = ("wandb",)


class MetricLog:
    """Sends figures and messages to the console, to `metrics.jsonl` and to the services of `report_to`.

    Only rank 0 writes; every other rank may call everything, and nothing happens. No sink can stop the training:
    one that fails says so once and falls silent.

    Args:
        output_dir: the run's directory.
        rank: of this process.
        report_to: ["wandb"], [] or "none".
        run_name: name of the run in wandb; wandb invents one when None.
        config: the resolved configuration, shown by wandb.
        wandb_project: None for wandb's own default (the environment variable WANDB_PROJECT).
        stream: of the console; the standard output when None.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        rank: int = 0,
        report_to: Sequence[str] | str | None = (),
        run_name: str | None = None,
        config: Mapping[str, Any] | None = None,
        wandb_project: str | None = None,
        stream: TextIO | None = None,
    ) -> None:
        services = resolve_services(report_to)
        self._console: ConsoleLog | None = None
        self._lines: JsonLines | None = None
        self._wandb: WandbSink | None = None
        if rank == 0:
            self._console = ConsoleLog(stream)
            self._lines = JsonLines(output_dir)
            if "wandb" in services:
                self._wandb = WandbSink(output_dir, project=wandb_project, run_name=run_name, config=config or {})

    def start(self, *, start_step: int, num_steps: int) -> None:
        """Open the sinks.

        Args:
            start_step: optimizer updates that are done; 0 begins a new record, more continues the old one.
            num_steps: of the whole run.
        """
        if self._console is None or self._lines is None:
            return
        self._lines.start(start_step)
        if self._wandb is not None:
            self._console.print(self._wandb.start(resumed=start_step > 0))
        self._console.start(start_step, num_steps)

    def advance(self, step: int) -> None:
        """A step is done, and no line is due."""
        if self._console is not None:
            self._console.advance(step)

    def log_step(self, metrics: StepMetrics) -> None:
        """Log the figures of a window of steps."""
        if self._console is None or self._lines is None:
            return
        record = metrics.as_record()
        self._console.log_step(metrics)
        self._lines.write("train", record)
        if self._wandb is not None:
            self._wandb.write("train", metrics.step, record)

    def log_eval(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log the figures of an evaluation after `step` optimizer updates."""
        if self._console is None or self._lines is None:
            return
        self._console.log_eval(step, metrics)
        self._lines.write("eval", {"step": step, **metrics})
        if self._wandb is not None:
            self._wandb.write("eval", step, metrics)

    def has_eval(self, step: int) -> bool:
        """Whether an evaluation after `step` optimizer updates is on record; only rank 0 knows."""
        return self._lines is not None and self._lines.has("eval", step)

    def log_save(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log what a checkpoint after `step` optimizer updates cost the loop; says nothing on the console."""
        if self._lines is None:
            return
        self._lines.write("save", {"step": step, **metrics})
        if self._wandb is not None:
            self._wandb.write("save", step, metrics)

    def message(self, text: str) -> None:
        """Tell the user something; above the bar on a terminal."""
        if self._console is not None:
            self._console.print(text)

    def close(self, exit_code: int = 0) -> None:
        """Close the sinks; may be called twice.

        Args:
            exit_code: of the process; wandb shows a run with another one than 0 as failed.
        """
        if self._console is None or self._lines is None:
            return
        self._console.close()
        self._lines.close()
        if self._wandb is not None:
            farewell = self._wandb.close(exit_code)
            if farewell:
                self._console.print(farewell)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(exit_code=0 if kind is None else 1)


def resolve_services(report_to: Sequence[str] | str | None) -> tuple[str, ...]:
    """The services that `report_to` names: a list of names, one name, or "none".

    Raises:
        ConfigError: a service is unknown.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    names = [name for name in names if name.lower() != "none"]
    unknown = [name for name in names if name not in SERVICES]
    if unknown:
        raise ConfigError(
            f'train.report_to: got {", ".join(unknown)}, expected a list of {", ".join(SERVICES)}, or "none"; '
            "console and metrics.jsonl are always written"
        )
    return tuple(names)
