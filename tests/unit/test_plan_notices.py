"""What is allowed in a run's lengths, and hardly meant, is told at its start."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.tiny_run import make_tiny_run
from vlm_dist.build.data import describe_plan
from vlm_dist.config import load_run
from vlm_dist.config.arithmetic import resolve_batch


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("lengths"), num_images=2, num_clips=1).config


@pytest.mark.parametrize(
    ("override", "step", "told"),
    [
        ("train.warmup_steps=6", 0, "the run has 6 steps, so that its learning rate does not get to learning_rate"),
        ("train.gradient_accumulation_steps=50", 0, "a step has room for 100 samples, an epoch has 48"),
        ("train.stop_at_step=3", 3, "train.stop_at_step is 3, and 3 steps are done: no step is trained"),
        ("train.stop_at_step=3", 0, None),
        ("train.warmup_steps=5", 0, None),
    ],
)
def test_lengths_that_are_hardly_meant(
    override: str, step: int, told: str | None, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_file.parent.parent)
    config = load_run(run_file, [override])
    plan: Any = SimpleNamespace(num_steps=6, num_epoch_samples=48, notices=(), settings=SimpleNamespace(pack=None))
    lines = describe_plan(config, plan, resolve_batch(config.train, 1), step)
    assert len(lines) == (told is not None)
    assert told is None or told in lines[0]
