"""train_config.yaml: what may have changed when a run goes on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.tiny_run import TinyRun
from tests.unit.test_key_effects.registry import shows
from vlm_dist.build.continuation import check_continuation
from vlm_dist.checkpoint import Checkpoint
from vlm_dist.config import load_run
from vlm_dist.errors import CheckpointError


def other_order(*ignored: Any) -> None:
    raise CheckpointError("the checkpoint's data order is not this run's:\n  seed: checkpoint 42, now 7\nput it back")


@shows("train.resume_anyway")
def test_a_change_is_refused_unless_it_is_named(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_run.directory)
    saved = load_run(tiny_run.config)
    info = {"plan": {}, "scheduler": {"num_steps": 6}, "optimizer": {"step": 3}}
    checkpoint = Checkpoint(tiny_run.directory / "run" / "checkpoint-3", 3, info, saved.to_yaml())
    plan: Any = SimpleNamespace(check_state=other_order, num_steps=6)

    def told(*overrides: str) -> list[str]:
        return check_continuation(load_run(tiny_run.config, overrides), checkpoint, plan)

    with pytest.raises(CheckpointError, match=r"train.resume_anyway=\[data\]: samples may be repeated or left out"):
        told()
    with pytest.raises(CheckpointError, match=r"of another model or adapter:\n  peft.r: 8 in the checkpoint, now 4"):
        told("peft.r=4")  # which changes no order, but another model does
    with pytest.raises(CheckpointError, match=r"lengths depend:\n  model.processor_params.max_pixels: None .*\n"):
        told("model.processor_params.max_pixels=50176")
    (line,) = told("train.resume_anyway=[data]")
    assert "goes on at step 3 of another order" in line
    assert "\n  seed: checkpoint 42, now 7" in line
    assert "put it back" not in line
    with pytest.raises(CheckpointError, match=r"train.resume_anyway=\[model\]"):
        told("train.resume_anyway=[data]", "peft.lora_alpha=4")
    with pytest.raises(CheckpointError) as refused:
        told("train.resume_anyway=[data]", "peft.r=4")
    assert "resume_anyway" not in str(refused.value)  # it could not take over a single tensor
    assert "peft.r: 8 in the checkpoint, now 4" in told("train.resume_anyway=[data, model]", "peft.r=4")[1]
