"""Early stopping: enough is enough when evaluations get no better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_dist.checkpoint.retention import metric_value


class EarlyStopping:
    """Counts evaluations without improvement, as Hugging Face's EarlyStoppingCallback does.

    It has no state of its own to save: a resumed run hears the evaluations that are on record once more.

    Args:
        metric: as `metric_for_best_model` names it.
        greater_is_better: of the metric.
        patience: evaluations one after the other that may bring no improvement; with so many the run is over.
        threshold: an improvement is more than this over the best so far.
    """

    def __init__(self, metric: str, greater_is_better: bool, patience: int, threshold: float = 0.0) -> None:
        self._metric = metric
        self._sign = 1 if greater_is_better else -1
        self._patience = patience
        self._threshold = threshold
        self._best: tuple[float, int] | None = None  # value, position
        self._num_without = 0

    def hear(self, position: int, figures: Mapping[str, Any]) -> None:
        """Hear of an evaluation; one without a number for the metric is no improvement.

        Args:
            position: steps that are done.
            figures: of the evaluation, the same on every rank.
        """
        value = metric_value(self._metric, figures)
        gain = None if value is None or self._best is None else self._sign * (value - self._best[0])
        is_better = value is not None and (gain is None or gain > self._threshold)
        self._num_without = 0 if is_better else self._num_without + 1
        if value is not None and (gain is None or gain > 0):
            self._best = (value, position)

    @property
    def is_over(self) -> bool:
        """Whether the run is to end now."""
        return self._num_without >= self._patience

    def __str__(self) -> str:
        best = (
            "it never was a number" if self._best is None else f"the best was {self._best[0]:.6g}, step {self._best[1]}"
        )
        beyond = f" by more than {self._threshold:g}" if self._threshold else ""
        return f"early stopping: {self._metric} has not improved{beyond} for {self._num_without} evaluations ({best})"
