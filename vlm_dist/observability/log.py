"""The one place that the loop reports to."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from vlm_dist.errors import ConfigError
from vlm_dist.observability import tensorboard_sink
from vlm_dist.observability.console import ConsoleLog
from vlm_dist.observability.events import EventLog
from vlm_dist.observability.jsonl import JsonLines
from vlm_dist.observability.metrics import StepMetrics
from vlm_dist.observability.sinks import Sink
from vlm_dist.observability.tensorboard_sink import TensorBoardSink
from vlm_dist.observability.wandb_sink import WandbNames, WandbSink

logger = logging.getLogger(__name__)

SERVICES = ("wandb", "tensorboard")

#: Generated answers of an evaluation that services show; all of them are in the file.
MAX_PREDICTIONS = 32


class MetricLog:
    """Sends figures and messages to the console, to `metrics.jsonl` and to the services of `report_to`.

    Only rank 0 writes; every other rank may call everything, and nothing happens. No sink can stop the training:
    one that fails says so once and falls silent.

    Args:
        output_dir: the run's directory.
        rank: of this process.
        report_to: ["wandb", "tensorboard"], one of them, [] or "none".
        run_name: name of the run in wandb; wandb invents one when None.
        config: the resolved configuration, shown by the services.
        wandb: what else wandb calls the run.
        stream: of the console; the standard output when None.

    Raises:
        ConfigError: a service is unknown, or its package is missing.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        rank: int = 0,
        report_to: Sequence[str] | str | None = (),
        run_name: str | None = None,
        config: Mapping[str, Any] | None = None,
        wandb: WandbNames | None = None,
        stream: TextIO | None = None,
    ) -> None:
        services = resolve_services(report_to)
        if "tensorboard" in services:
            tensorboard_sink.check_installed()
        self._output_dir = output_dir
        self._console: ConsoleLog | None = None
        self._lines: JsonLines | None = None
        self._events: EventLog | None = None
        self._sinks: list[Sink] = []
        self._picture_of: Callable[[Mapping[str, Any]], Any | None] = lambda row: None
        if rank == 0:
            self._console = ConsoleLog(stream)
            self._lines = JsonLines(output_dir)
            self._events = EventLog(output_dir)
            if "wandb" in services:
                names = wandb or WandbNames()
                self._sinks.append(WandbSink(output_dir, names=names, run_name=run_name, config=config or {}))
            if "tensorboard" in services:
                self._sinks.append(TensorBoardSink(output_dir, config=config or {}))

    def start(self, *, start_step: int, num_steps: int) -> None:
        """Open the sinks.

        Args:
            start_step: optimizer updates that are done; 0 begins a new record, more continues the old one.
            num_steps: of the whole run.
        """
        if self._console is None or self._lines is None:
            return
        self._lines.start(start_step)
        for sink in self._sinks:
            self._console.print(sink.start(start_step))
        self._console.start(start_step, num_steps)

    def advance(self, step: int, eta_seconds: float | None = None) -> None:
        """A step is done, and no line is due."""
        if self._console is not None:
            self._console.advance(step, eta_seconds)

    def log_step(self, metrics: StepMetrics) -> None:
        """Log the figures of a window of steps."""
        if self._console is not None:
            self._console.log_step(metrics)
            self._write("train", metrics.step, metrics.as_record())

    def log_eval(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log the figures of an evaluation after `step` optimizer updates, and some of its answers."""
        if self._console is None:
            return
        self._console.log_eval(step, metrics)
        self._write("eval", step, metrics)
        if self._sinks and (rows := read_predictions(self._output_dir / "predictions" / f"step-{step}.jsonl")):
            pictures = [self._picture_of(row) for row in rows]
            for sink in self._sinks:
                sink.write_predictions(step, rows, pictures)

    def show_pictures(self, picture_of: Callable[[Mapping[str, Any]], Any | None]) -> None:
        """Have answers shown with pictures.

        Args:
            picture_of: a line of a file of predictions -> a small Pillow picture, or None.
        """
        self._picture_of = picture_of

    def has_eval(self, step: int) -> bool:
        """Whether an evaluation after `step` optimizer updates is on record; only rank 0 knows."""
        return self._lines is not None and self._lines.has("eval", step)

    def log_save(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log what a checkpoint after `step` optimizer updates cost the loop; says nothing on the console."""
        if self._lines is not None:
            self._write("save", step, metrics)

    def log_adapter(self, directory: Path, files: Sequence[str], step: int, aliases: Sequence[str]) -> None:
        """Hand an adapter to the services that keep files.

        Args:
            directory: that it lies in.
            files: of it; those that are not there are left out.
            step: optimizer updates that are done.
            aliases: such as "best".
        """
        for sink in self._sinks:
            sink.write_adapter(directory, [name for name in files if (directory / name).is_file()], step, aliases)

    def event(self, event: str, /, step: int | None = None, **fields: Any) -> None:
        """Write an event into `events.jsonl`; see `vlm_dist.observability.events`. May be called by any thread."""
        if self._events is not None:
            self._events.write(event, step, **fields)

    def message(self, text: str) -> None:
        """Tell the user something; above the live line on a terminal."""
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
        for sink in self._sinks:
            farewell = sink.close(exit_code)
            if farewell:
                self._console.print(farewell)

    def _write(self, kind: str, step: int, figures: Mapping[str, Any]) -> None:
        assert self._lines is not None
        self._lines.write(kind, {"step": step, **figures})
        for sink in self._sinks:
            sink.write(kind, step, figures)

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


def read_predictions(path: Path, limit: int = MAX_PREDICTIONS) -> list[dict[str, Any]]:
    """The first answers of each source, so that all sources are seen.

    Args:
        path: a file of predictions, one JSON object a line with `source`; none where there is no such file.
        limit: of their number.
    """
    by_source: dict[str, list[dict[str, Any]]] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                of_source = by_source.setdefault(str(row.get("source")), [])
                if len(of_source) < limit:
                    of_source.append(row)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError) as error:
        logger.warning("%s cannot be shown: %s", path, error)
        return []
    in_turn = itertools.zip_longest(*by_source.values())
    rows = [row for turn in in_turn for row in turn if row is not None][:limit]
    return sorted(rows, key=lambda row: list(by_source).index(str(row.get("source"))))
