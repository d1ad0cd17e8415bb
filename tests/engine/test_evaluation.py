"""Loading, adapter and evaluation on real ZeRO-2 and ZeRO-3 engines: same weights, answers of different length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import tiny
from tests.ranks import Ranks, run_ranks
from tests.unit.test_evaluate import ENTRY, METRICS, SHAPE, InlinePool, Questions, make_evaluator
from vlm_dist.config.peft import PeftConfig
from vlm_dist.data.types import MicroBatchJob, SampleRef
from vlm_dist.demo.tiny_model import save_tiny_qwen2_vl
from vlm_dist.engine import Engine, zero_init_context
from vlm_dist.model import (
    attach_adapter,
    enable_gradient_checkpointing,
    load_model,
    load_processor,
    tower_table,
)
from vlm_dist.optim import parameter_groups

pytestmark = pytest.mark.engine

POLICY = {"vision": "lora", "projector": "lora", "language": "lora"}


def make_engine(directory: Path, stage: int, world_size: int) -> tuple[Engine, list[Any]]:
    config = tiny.ds_config(stage, world_size)
    with zero_init_context(config):
        model = load_model(str(directory), ENTRY, dtype="float32")
        # a third of all tokens ends an answer, so that the ranks finish at different times
        model.generation_config.eos_token_id = list(range(0, model.config.text_config.vocab_size, 3))
        model = attach_adapter(model, PeftConfig(r=5, lora_dropout=0.0), POLICY, seed=1)
    enable_gradient_checkpointing(model)
    table = tower_table(model, POLICY)
    model.train()
    return Engine.initialise(model, tiny.adamw, parameter_groups(model, 0.1), tiny.schedule, config), table


def train(ranks: Ranks, directory: Path, stage: int, evaluating: bool, out: Path) -> dict[str, Any]:
    engine, table = make_engine(directory, stage, ranks.world_size)
    sources = [Questions("train", 12)]
    processor = load_processor(str(directory), ENTRY)
    pool = InlinePool(sources, processor)
    # 5 samples on 2 ranks, 2 at a time: rank 1's last batch is nothing but a dummy
    evaluator = make_evaluator(
        ranks, directory, [Questions("held-out", 5)], engine, predictions_dir=out, metrics=METRICS
    )
    losses, metrics = [], []
    for step in range(3):
        refs = tuple(SampleRef(0, 4 * step + 2 * ranks.rank + i) for i in (0, 1))
        batch = pool.make(MicroBatchJob(step, ranks.rank, refs))
        loss, outcome = tiny.run_step(engine, [(batch.inputs, batch.labels)], 12)
        losses.append((loss, outcome.grad_norm))
        if evaluating:
            metrics.append(evaluator.run(step))
    state = engine.collect_trainable()
    masters = {name: value.master.numpy().tobytes() for name, value in state.parameters.items()} if state else {}
    engine.close()
    return {"losses": losses, "metrics": metrics, "masters": masters, "table": table}


def both(ranks: Ranks, directory: Path, out: Path) -> dict[str, Any]:
    torch.manual_seed(ranks.rank)
    return {
        f"zero{stage} {evaluating}": train(ranks, directory, stage, evaluating, out / f"zero{stage}")
        for stage in (2, 3)
        for evaluating in (False, True)
    }


def test_evaluation_on_real_engines(tmp_path: Path) -> None:
    directory = save_tiny_qwen2_vl(tmp_path / "model", SHAPE, dtype=torch.float32)
    results = run_ranks(both, 2, directory, tmp_path, timeout_seconds=120)
    for rank in results:
        for stage in ("zero2", "zero3"):
            # not one bit of training depends on whether there was an evaluation
            assert rank[f"{stage} True"]["losses"] == rank[f"{stage} False"]["losses"]
            assert rank[f"{stage} True"]["masters"] == rank[f"{stage} False"]["masters"]
            assert rank[f"{stage} True"]["metrics"] == results[0][f"{stage} True"]["metrics"]
        assert rank["zero2 True"]["table"] == rank["zero3 True"]["table"]  # partitioned parameters are counted whole
        # the same adapter start at both stages
        assert rank["zero3 True"]["losses"][0][0] == pytest.approx(rank["zero2 True"]["losses"][0][0], rel=1e-6)
    for two, three in zip(results[0]["zero2 True"]["metrics"], results[0]["zero3 True"]["metrics"], strict=True):
        assert three == pytest.approx(two, rel=1e-4)
        assert two["held-out/num_samples"] == 5
        assert {f"held-out/{name}" for name in METRICS} < set(two)
    for step in range(3):
        lines = [(tmp_path / stage / f"step-{step}.jsonl").read_text() for stage in ("zero2", "zero3")]
        assert lines[0] == lines[1]
        predictions = [json.loads(line)["prediction"] for line in lines[0].splitlines()]
        assert len({len(prediction) for prediction in predictions}) > 1, "all answers are as long: nothing was tested"
