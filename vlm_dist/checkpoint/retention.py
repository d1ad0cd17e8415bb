"""Which checkpoints stay: the newest, the best by a metric, and every so many steps one for ever."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_dist.checkpoint.layout import checkpoint_name
from vlm_dist.config.answer_metrics import EVAL_PREFIX, OVERALL, is_greater_better
from vlm_dist.errors import CheckpointError

#: In the output directory: which checkpoint is the best so far, by what.
BEST_FILE = "best_checkpoint.json"


@dataclass(frozen=True)
class Retention:
    """What is kept.

    Attributes:
        total_limit: complete checkpoints to keep, the best one among them; at least 1; None keeps all.
        keep_steps: those of steps that are multiples of it stay, and are not counted; 0 is none.
        metric: by which one is the best; see `metric_value`. None: there is no best.
        greater_is_better: of the metric; None: it is known of each metric.
    """

    total_limit: int | None = None
    keep_steps: int = 0
    metric: str | None = None
    greater_is_better: bool | None = None

    def __post_init__(self) -> None:
        if self.total_limit is not None and self.total_limit < 1:
            raise CheckpointError(f"save_total_limit is {self.total_limit}, expected at least 1, or null for no limit")

    @property
    def is_greater_better(self) -> bool:
        """Which of two values is the better one."""
        if self.greater_is_better is None:
            return is_greater_better(self.metric or "")
        return self.greater_is_better

    def doomed(self, steps: Iterable[int], best: int | None) -> list[int]:
        """The steps whose checkpoints go, oldest first.

        Args:
            steps: of the complete checkpoints.
            best: the step of the best one, if there is one.
        """
        if self.total_limit is None:
            return []
        counted = sorted((s for s in steps if not (self.keep_steps and s % self.keep_steps == 0)), reverse=True)
        # the newest first, then the best, which takes one of the places but never that of the newest
        by_worth = sorted(counted[1:], key=lambda step: (step == best, step), reverse=True)
        num_others = max(self.total_limit - 1, int(best in by_worth))
        return sorted(by_worth[num_others:])


@dataclass(frozen=True)
class Best:
    """The best checkpoint so far."""

    step: int
    metric: str
    value: float


def metric_value(metric: str, figures: Mapping[str, Any]) -> float | None:
    """A metric's value among the figures of an evaluation; None where it is not there or not a number.

    Args:
        metric: `<source>/loss` as in metrics.jsonl, `overall/loss` over all samples, or `eval_loss`,
            `eval_exact_match`: the mean over the sources, each counting the same. The prefix may be left out.
        figures: by `<source>/<figure>`.
    """
    name = metric if metric in figures else metric.removeprefix(EVAL_PREFIX)  # a source may be called eval_...
    of_sources = [v for key, v in figures.items() if key.rpartition("/")[2] == name and key != f"{OVERALL}/{name}"]
    values = [figures[name]] if name in figures else of_sources
    if not values or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        return None
    return math.fsum(values) / len(values)


def read_best(output_dir: Path, metric: str | None) -> Best | None:
    """The best checkpoint by a metric, if one is marked and is there.

    Raises:
        CheckpointError: the mark cannot be read.
    """
    best = marked_best(output_dir)
    return best if best is not None and best.metric == metric else None


def marked_best(output_dir: Path) -> Best | None:
    """The checkpoint that is marked as the best, by whatever metric, if it is there.

    Raises:
        CheckpointError: the mark cannot be read.
    """
    try:
        content = json.loads((output_dir / BEST_FILE).read_text(encoding="utf-8"))
        best = Best(int(content["step"]), str(content["metric"]), float(content["value"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{output_dir / BEST_FILE} cannot be read: {error!r}") from error
    return best if (output_dir / checkpoint_name(best.step)).is_dir() else None


def forget_best(output_dir: Path, first_step: int) -> None:
    """Take the mark away from a checkpoint of a step or a later one: it is another one now, or is gone.

    Raises:
        CheckpointError: it could not be removed.
    """
    path = output_dir / BEST_FILE
    try:
        if int(json.loads(path.read_text(encoding="utf-8"))["step"]) >= first_step:
            path.unlink()
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or none that `read_best` would take
        return
    except OSError as error:
        raise CheckpointError(f"{path} could not be removed: {error}") from error


def write_best(output_dir: Path, best: Best, greater_is_better: bool) -> None:
    """Mark a checkpoint as the best one, in one step.

    Raises:
        CheckpointError: it could not be written.
    """
    content = {
        "checkpoint": checkpoint_name(best.step),
        "step": best.step,
        "metric": best.metric,
        "value": best.value,
        "greater_is_better": greater_is_better,
    }
    path = output_dir / BEST_FILE
    fresh = output_dir / f".{BEST_FILE}.writing"
    try:
        with fresh.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error
