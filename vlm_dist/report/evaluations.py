"""Figures of one evaluation, as a line of metrics.jsonl has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlm_dist.config.answer_metrics import OVERALL
from vlm_dist.report.lines import as_number


def losses_by_source(record: Mapping[str, Any]) -> dict[str, float]:
    """The losses of an evaluation, but for that over all samples."""
    losses = figures_by_source(record).get("loss", {})
    return {source: loss for source, loss in losses.items() if source != OVERALL}


def held_out_loss(record: Mapping[str, Any]) -> float:
    """Over all samples; where that is not on record, the mean over the sources; NaN where there is none."""
    losses = figures_by_source(record).get("loss", {})
    if OVERALL in losses:
        return losses[OVERALL]
    return sum(losses.values()) / len(losses) if losses else math.nan


def figures_by_source(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Figures of an evaluation: name -> source -> number; NaN where the source has none."""
    found: dict[str, dict[str, float]] = {}
    for key, value in record.items():
        source, slash, name = key.rpartition("/")
        if slash and (value is None or as_number(value) is not None):
            found.setdefault(name, {})[source] = math.nan if value is None else float(value)
    return found
