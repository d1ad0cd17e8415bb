"""A rank whose device is slow is found at any ZeRO stage, though all ranks wait for it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.tiny_run import TinyRun, make_tiny_run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("slowest"))


def train(ranks: Any, run: TinyRun) -> list[int]:
    """Two runs, in which a layer of rank 1 takes half a second longer; how often weights were waited for in each."""
    from vlm_dist.build import run_parts
    from vlm_dist.config import load_run
    from vlm_dist.engine import prepare_deepspeed

    os.chdir(run.directory)
    prepare_deepspeed()
    waits: list[int] = []
    for stage in (2, 3):
        overrides = [f"train.output_dir=slow{stage}", "train.max_steps=4", "train.logging_steps=4"]
        config = load_run(Path("configs/tiny.yaml"), [*overrides, f"deepspeed=ds_configs/tiny{stage}.json"])
        with run_parts(config, ranks) as parts:
            layers = [m for name, m in parts.trainer.engine.module.named_modules() if name.endswith("layers.0.mlp")]
            assert len(layers) == 1
            if ranks.rank == 1:
                layers[0].register_forward_pre_hook(lambda module, args: time.sleep(0.5))
            timer = parts.trainer.engine.forward_timer
            leave_out, seen = timer.leave_out, []
            timer.leave_out = lambda seen=seen, leave_out=leave_out: (seen.append(1), leave_out())[1]  # type: ignore[method-assign]
            parts.trainer.run()
            waits.append(len(seen))
    return waits


def test_it_is_found(run: TinyRun) -> None:
    for waits in run_ranks(train, 2, run, timeout_seconds=200):
        assert waits[0] == 0 < waits[1]
    for stage in (2, 3):
        (line,) = run.metrics(f"slow{stage}")
        assert line["slowest_rank"] == 1
        assert line["slowest_rank_ratio"] > 1.5, (stage, line["slowest_rank_ratio"])
