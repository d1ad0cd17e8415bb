"""DeepSpeed's Adam for an offloaded optimizer: torch's up to rounding, and replaced by it where it cannot run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine import tiny
from tests.ranks import Ranks, run_ranks
from vlm_dist.engine import cpu_adam

pytestmark = pytest.mark.engine

OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
STEPS = [[tiny.micro_batch(10 * step + index) for index in range(2)] for step in range(3)]


def train(ranks: Ranks, model: Path, problem_on: int | None) -> dict[str, Any]:
    if problem_on == ranks.rank:
        cpu_adam._state["problem"] = "no compiler"
    messages: list[str] = []
    results: dict[str, Any] = {}
    for stage in (2, 3):
        engine = tiny.make_engine(
            model, tiny.ds_config(stage, ranks.world_size, zero=dict(OFFLOAD)), report=messages.append
        )
        results["optimizer"] = type(engine._optimizer).__name__
        if problem_on is None:  # a step that never happened leaves no trace, in its count of steps either
            with engine.rehearsal():
                tiny.run_step(engine, STEPS[2][ranks.rank :: ranks.world_size], tiny.num_targets(STEPS[2]))
        for batches in STEPS:
            tiny.run_step(engine, batches[ranks.rank :: ranks.world_size], tiny.num_targets(batches))
        state = engine.collect_trainable()
        if state is not None:  # all of it, by name: moments and the number of updates too
            results[f"state {stage}"] = (
                state.step,
                {(name, part): t.numpy() for name, s in state.parameters.items() for part, t in vars(s).items()},
            )
        engine.close()
    return {**results, "messages": messages}


def test_equal_to_torch_and_replaced_where_a_rank_has_no_compiler(tmp_path: Path) -> None:
    tiny.compile_cpu_adam()
    model = tiny.save_tiny_vlm(tmp_path / "model")
    compiled = run_ranks(train, 2, model, None, timeout_seconds=240)
    replaced = run_ranks(train, 2, model, 1, timeout_seconds=240)
    assert {rank["optimizer"] for rank in compiled} == {"DeepSpeedCPUAdam"}
    assert compiled[0]["messages"] == []
    assert {rank["optimizer"] for rank in replaced} == {"AdamW"}  # rank 0 has a compiler
    told = "notice: rank 1 cannot use DeepSpeed's CPU Adam, so all use torch's AdamW: no compiler"
    assert replaced[0]["messages"] == [told, told]
    for stage in (2, 3):
        (step, left), (_, right) = compiled[0][f"state {stage}"], replaced[0][f"state {stage}"]
        assert step == len(STEPS)
        assert max(float(abs(left[key] - right[key]).max()) for key in left) < 1e-5


def test_a_compiler_that_fails_or_a_wrong_result_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler, no ninja
    problem = cpu_adam._compile_and_try()
    assert problem is not None
    assert "it needs g++ and ninja" in problem
    monkeypatch.setattr("deepspeed.ops.op_builder.CPUAdamBuilder.load", lambda self, verbose: None)
    monkeypatch.setattr(cpu_adam, "_deviation_from_torch", lambda: float("nan"))
    assert "deviates from torch's by nan" in str(cpu_adam._compile_and_try())
