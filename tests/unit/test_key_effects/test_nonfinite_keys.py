"""train_config.yaml: what a run does that has diverged, as a learning rate of 1e30 makes it in its second step."""

from __future__ import annotations

import pytest

from tests.tiny_run import TinyRun
from tests.unit.test_key_effects.registry import shows
from vlm_dist.errors import ExitCode

pytestmark = pytest.mark.e2e

DIVERGES = ("train.learning_rate=1e30", "train.lr_scheduler_type=constant", "train.max_grad_norm=0")


@shows("train.nonfinite_steps")
def test_fail_ends_the_run_at_once(tiny_run: TinyRun) -> None:
    ended = tiny_run.train(*DIVERGES, "train.output_dir=failed", "train.nonfinite_steps=fail")
    assert ended.exit_code == ExitCode.DIVERGED, ended.output[-3000:]
    assert "Traceback" not in ended.output
    assert "step 2: the gradient of" in ended.output
    assert "train.nonfinite_steps is fail" in ended.output
    assert [record["step"] for record in tiny_run.metrics("failed")] == [1]
    assert (tiny_run.directory / "failed" / "checkpoint-1").is_dir()


@shows("train.max_nonfinite_steps")
def test_skipping_ends_after_so_many_in_a_row(tiny_run: TinyRun) -> None:
    ended = tiny_run.train(*DIVERGES, "train.output_dir=skipped", "train.max_nonfinite_steps=3")
    assert ended.exit_code == ExitCode.DIVERGED, ended.output[-3000:]
    assert "step 4: the gradient of" in ended.output
    assert "it is the 3rd step in a row, and train.max_nonfinite_steps is 3" in ended.output
    assert [record["num_nonfinite_steps"] for record in tiny_run.metrics("skipped")] == [0, 1, 1]
    assert (tiny_run.directory / "skipped" / "checkpoint-3").is_dir()
