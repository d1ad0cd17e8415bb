"""What saves the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.checkpoint.test_store import save
from vlm_dist.build.saving import check_best_metric, store_report
from vlm_dist.checkpoint import CheckpointStore
from vlm_dist.errors import ConfigError
from vlm_dist.observability.log import MetricLog


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_set_aside_is_told_on_every_node(rank: int, tmp_path: Path, caplog: Any, capsys: Any) -> None:
    ranks: Any = SimpleNamespace(is_main=rank == 0)
    store = CheckpointStore(tmp_path, report=store_report(ranks, MetricLog(tmp_path, rank=rank)))
    save(store, 4)
    save(store, 2)  # resumed from an earlier one
    assert "renamed to superseded-1-checkpoint-4" in capsys.readouterr().out + caplog.text


def test_the_best_by_a_source_that_is_not_there_is_refused() -> None:
    def check(metric: str | None) -> None:
        config: Any = SimpleNamespace(train=SimpleNamespace(metric_for_best_model=metric))
        check_best_metric(config, [SimpleNamespace(name=name) for name in ("images", "eval_clips")])  # type: ignore[misc]

    for metric in (None, "eval_loss", "images/loss", "eval_images/loss", "eval_clips/exact_match"):
        check(metric)
    with pytest.raises(ConfigError, match="no source 'imges', only images, eval_clips, overall; did you mean images"):
        check("imges/loss")
