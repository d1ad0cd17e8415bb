"""The newest, the best and every so many steps one stay; the others go."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.unit.checkpoint.test_store import names, save
from vlm_dist.checkpoint import CheckpointStore, Retention
from vlm_dist.checkpoint.retention import BEST_FILE, metric_value


def kept(directory: Path) -> list[int]:
    return sorted(int(name.rpartition("-")[2]) for name in names(directory) if name.startswith("checkpoint-"))


def run(directory: Path, retention: Retention, figures: dict[int, dict[str, Any]], steps: int = 6) -> CheckpointStore:
    """Save every step, and evaluate some of them afterwards."""
    store = CheckpointStore(directory, retention)
    for step in range(1, steps + 1):
        save(store, step)
        if step in figures:
            store.mark(step, figures[step])
    return store


LOSSES = {step: {"a/loss": loss} for step, loss in enumerate((3.0, 1.0, 2.0, 2.5, 1.5, 4.0), start=1)}


@pytest.mark.parametrize(
    ("retention", "wanted"),
    [
        (Retention(2), [5, 6]),
        (Retention(2, metric="eval_loss"), [2, 6]),
        (Retention(3, metric="eval_loss"), [2, 5, 6]),
        (Retention(1, metric="eval_loss"), [2, 6]),  # Hugging Face: the newest is never given up for the best
        (Retention(1, metric="eval_loss", greater_is_better=True), [6]),
        (Retention(2, keep_steps=3), [3, 4, 5, 6]),
        (Retention(1, keep_steps=4, metric="eval_loss"), [2, 4, 6]),
        (Retention(None, metric="eval_loss"), [1, 2, 3, 4, 5, 6]),
    ],
)
def test_what_stays(tmp_path: Path, retention: Retention, wanted: list[int]) -> None:
    run(tmp_path, retention, LOSSES)
    assert kept(tmp_path) == wanted


def test_the_best_is_named(tmp_path: Path) -> None:
    run(tmp_path, Retention(2, metric="eval_loss"), LOSSES)
    best = json.loads((tmp_path / BEST_FILE).read_text())
    assert best == {
        "checkpoint": "checkpoint-2",
        "step": 2,
        "metric": "eval_loss",
        "value": 1.0,
        "greater_is_better": False,
    }


def test_the_mark_outlives_a_resumed_run(tmp_path: Path) -> None:
    retention = Retention(1, metric="eval_loss")
    run(tmp_path, retention, {1: {"a/loss": 1.0}}, steps=2)
    store = CheckpointStore(tmp_path, retention)
    save(store, 7)
    store.mark(7, {"a/loss": math.nan})  # is never the best
    assert kept(tmp_path) == [1, 7]
    store.mark(7, {"a/loss": 0.5})
    assert kept(tmp_path) == [7]


def test_another_metric_begins_anew(tmp_path: Path) -> None:
    run(tmp_path, Retention(1, metric="eval_loss"), {1: {"a/loss": 1.0}}, steps=2)
    store = CheckpointStore(tmp_path, Retention(1, metric="exact_match"))
    save(store, 7)
    store.mark(7, {"a/exact_match": 0.1})
    assert kept(tmp_path) == [7]


def test_a_checkpoint_that_is_not_there_is_not_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, Retention(1, metric="eval_loss"))
    save(store, 1)
    store.mark(2, {"a/loss": 1.0})
    assert not (tmp_path / BEST_FILE).exists()


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("eval_loss", 1.5),
        ("loss", 1.5),
        ("b/loss", 2.0),
        ("eval_b/loss", 2.0),
        ("eval_exact_match", None),
        ("c/loss", None),
    ],
)
def test_values_of_metrics(metric: str, value: float | None) -> None:
    figures = {"a/loss": 1.0, "b/loss": 2.0, "a/num_samples": 7, "a/exact_match": 0.5, "b/exact_match": math.nan}
    assert metric_value(metric, figures) == value


def test_the_figure_over_all_samples_is_no_source() -> None:
    figures = {"a/anls": 0.25, "b/anls": 0.75, "overall/anls": 0.3}
    assert metric_value("eval_anls", figures) == 0.5
    assert metric_value("overall/anls", figures) == metric_value("eval_overall/anls", figures) == 0.3
    assert Retention(metric="overall/anls").is_greater_better and not Retention(metric="a/wer").is_greater_better


def test_a_source_may_be_called_eval() -> None:
    figures = {"eval_docs/loss": 1.0, "docs/loss": 2.0}
    assert metric_value("eval_docs/loss", figures) == 1.0
    assert metric_value("eval_loss", figures) == 1.5


def test_nothing_is_deleted_while_nobody_knows_which_is_the_best(tmp_path: Path) -> None:
    retention = Retention(1, metric="eval_loss")
    run(tmp_path, retention, {1: {"a/loss": 1.0}}, steps=2)
    (tmp_path / BEST_FILE).write_text("{broken")
    told: list[str] = []
    store = CheckpointStore(tmp_path, retention, report=told.append)
    save(store, 3)
    assert kept(tmp_path) == [1, 2, 3]
    assert "best_checkpoint.json cannot be read" in told[-1] and "no checkpoint is deleted" in told[-1]
    store.mark(3, {"a/loss": 2.0})
    assert kept(tmp_path) == [3]


@pytest.mark.parametrize("next_step", [2, 3])
def test_the_mark_of_a_future_that_was_left_is_no_others(tmp_path: Path, next_step: int) -> None:
    retention = Retention(1, metric="eval_loss")
    run(tmp_path, retention, {1: {"a/loss": 3.0}, 3: {"a/loss": 1.0}}, steps=3)
    store = CheckpointStore(tmp_path, retention)
    for step in range(next_step, 6):  # resumed from step 1, without an evaluation of step 3
        save(store, step)
    store.mark(5, {"a/loss": 2.0})
    assert json.loads((tmp_path / BEST_FILE).read_text())["step"] == 5
    assert kept(tmp_path) == [5]
