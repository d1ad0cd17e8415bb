"""TensorBoard: event files in `output_dir/tensorboard`, which `tensorboard --logdir` reads."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_dist.errors import ConfigError
from vlm_dist.observability.attempt import attempt
from vlm_dist.observability.sinks import under_group

DIRECTORY = "tensorboard"


class TensorBoardSink:
    """One directory of event files; a start of the run adds a file, which hides the later steps of those before it.

    Args:
        output_dir: of the run.
        config: shown as text.
    """

    def __init__(self, output_dir: Path, *, config: Mapping[str, Any]) -> None:
        self._directory = output_dir / DIRECTORY
        self._config = config
        self._writer: Any = None

    def start(self, start_step: int) -> str:
        """See `Sink`."""
        if not attempt("starting TensorBoard's writer", lambda: self._open(start_step)):
            return "tensorboard: not used"
        return f"tensorboard: {self._directory}"

    def write(self, group: str, step: int, record: Mapping[str, Any]) -> None:
        """See `Sink`. What is no number is left out."""
        figures = {
            name: float(value)
            for name, value in under_group(group, record).items()
            if isinstance(value, int | float) and math.isfinite(value)
        }

        def add() -> None:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()  # whoever looks sees the last line of the log, and so does a run that was killed

        self._use(add)

    def write_predictions(self, step: int, rows: Sequence[Mapping[str, Any]], pictures: Sequence[Any | None]) -> None:
        """See `Sink`: a table in Markdown, which has no pictures."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
        lines += ["| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in rows]
        self._use(lambda: self._writer.add_text("eval/predictions", "\n".join(lines), step))

    def write_adapter(self, directory: Path, files: Sequence[str], step: int, aliases: Sequence[str]) -> None:
        """TensorBoard keeps no files."""

    def close(self, exit_code: int) -> str | None:
        """See `Sink`."""
        self._use(lambda: self._writer.close())
        self._writer = None
        return None

    def _open(self, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # every event from this step on that an earlier file has is dropped by the reader
        purge_step = start_step + 1 if start_step else 0
        self._writer = SummaryWriter(str(self._directory), purge_step=purge_step)  # type: ignore[no-untyped-call]
        if start_step == 0:
            import yaml

            text = yaml.safe_dump(dict(self._config), sort_keys=False, allow_unicode=True)
            self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), 0)

    def _use(self, action: Callable[[], Any]) -> None:
        if self._writer is not None and not attempt("writing for TensorBoard", action):
            self._writer = None


def check_installed() -> None:
    """Refuse a run that asks for TensorBoard where its package is missing.

    Raises:
        ConfigError: it is missing; names the extra that brings it.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "train.report_to: tensorboard needs the package tensorboard, which is not installed: "
            "pip install 'vlm-dist[tensorboard]', or take it out of the list"
        )


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
