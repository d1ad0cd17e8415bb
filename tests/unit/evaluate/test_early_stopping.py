"""When a run has had enough."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlm_dist.build.evaluation import evaluations_until, make_patience
from vlm_dist.checkpoint import CheckpointStore
from vlm_dist.config.train import TrainConfig
from vlm_dist.evaluate import EarlyStopping


def ends_at(values: list[float | None], patience: int, threshold: float = 0.0, greater: bool = False) -> int | None:
    stopping = EarlyStopping("eval_loss", greater, patience, threshold)
    for position, value in enumerate(values, start=1):
        stopping.hear(position, {"a/loss": value})
        if stopping.is_over:
            return position
    return None


@pytest.mark.parametrize(
    ("values", "patience", "threshold", "greater", "end"),
    [
        ([3, 2, 1, 0.5], 1, 0, False, None),
        ([3, 2, 2.5, 1, 2, 2, 2], 2, 0, False, 6),  # an improvement between begins the count anew
        ([3, 3, 3], 2, 0, False, 3),  # as good is no better
        ([3, 2.95, 2.9, 2.85], 3, 0.1, False, 4),  # each is compared with the best so far, however small its gain
        ([1, 2, 3], 1, 0, True, None),
        ([1, 0.5], 1, 0, True, 2),
        ([None, None, 3], 2, 0, False, 2),  # a loss that is no number is no improvement
        ([3, None, 2, None, None], 2, 0, False, 5),
    ],
)
def test_patience(values: list[float | None], patience: int, threshold: float, greater: bool, end: int | None) -> None:
    assert ends_at(values, patience, threshold, greater) == end


def test_it_says_why() -> None:
    stopping = EarlyStopping("eval_anls", True, 1, 0.01)
    stopping.hear(100, {"docs/anls": 0.75})
    stopping.hear(200, {"docs/anls": 0.755})
    assert str(stopping) == (
        "early stopping: eval_anls has not improved by more than 0.01 for 1 evaluations (the best was 0.755, step 200)"
    )


def test_a_resumed_run_remembers_the_evaluations_up_to_its_checkpoint(tmp_path: Path) -> None:
    """Not those of the steps behind it, which are done again."""
    records = [{"kind": "eval", "step": step, "a/loss": loss} for step, loss in ((2, 1.0), (4, 2.0), (6, 2.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records))
    settings = TrainConfig(metric_for_best_model="eval_loss", early_stopping_patience=2)
    ranks: Any = SimpleNamespace(
        is_main=True,
        rank=0,
        stop=SimpleNamespace(number=0),
        gather_objects=lambda value: [value],
        broadcast_object=lambda value: value,
    )
    for step, is_over in ((4, False), (6, True)):
        checkpoint: Any = SimpleNamespace(path=tmp_path / f"checkpoint-{step}", step=step)
        config: Any = SimpleNamespace(train=settings)
        stopping = make_patience(config, ranks, checkpoint)
        assert stopping is not None and stopping.is_over is is_over
    assert evaluations_until(tmp_path / "none" / "metrics.jsonl", 4) == []


def test_the_best_checkpoints_adapter_is_published(tmp_path: Path) -> None:
    from tests.unit.checkpoint.test_store import names, save
    from vlm_dist.checkpoint import Retention

    told: list[str] = []
    store = CheckpointStore(tmp_path, Retention(metric="eval_loss"), report=told.append)
    assert store.publish_best("eval_loss") is None  # there is none
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0)):
        save(store, step)
        store.mark(step, {"a/loss": loss})
    assert store.publish_best("eval_anls") is None
    assert store.publish_best("eval_loss") == (tmp_path / "adapter", 2)
    assert names(tmp_path / "adapter") == ["adapter_config.json", "adapter_model.safetensors"]
    for name in names(tmp_path / "adapter"):
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "checkpoint-2" / name).read_bytes()
    (tmp_path / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"torn")
    assert store.publish_best("eval_loss") is None and "damaged" in told[-1]
