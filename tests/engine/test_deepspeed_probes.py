"""What our engine relies on in DeepSpeed, asked of DeepSpeed alone: a version that changes it is noticed here.

Each probe says what to do where it fails. `tests/engine/test_step.py` shows the same through our engine.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

from tests.ranks import Ranks, run_ranks
from vlm_dist.engine import init_deepspeed_comm

pytestmark = pytest.mark.engine


class TwoParts(nn.Module):
    """Of which the second is used by some steps only, like a vision tower."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(4, 4, bias=False)
        self.sometimes = nn.Linear(4, 4, bias=False)

    def forward(self, inputs: torch.Tensor, both: bool) -> torch.Tensor:
        outputs = self.always(inputs)
        return (outputs + self.sometimes(inputs) if both else outputs).sum()


def initialise(stage: int, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = TwoParts()
    zero: dict[str, Any] = {"stage": stage, **changes.pop("zero", {})}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        **changes,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0) if stage == 0 else torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def whole(parameter: Any) -> torch.Tensor:
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().float().clone()


def step(engine: Any, both: bool, factor: float = 1.0) -> bool:
    inputs = torch.ones(1, 4, dtype=next(engine.module.parameters()).dtype)
    engine.backward(engine(inputs, both) * factor, scale_wrt_gas=False)
    engine.step()
    return bool(engine.was_step_applied())


def moved_without_gradient(stage: int, **changes: Any) -> float:
    """How far the unused part moves in a step in which its moments, and so AdamW's step, should only shrink."""
    engine = initialise(stage, **changes)
    for group in engine.basic_optimizer.param_groups:
        group.update(betas=(0.0, 0.0), weight_decay=0.0, lr=0.1)  # without memory: what moves it is a gradient
    step(engine, both=True)
    before = whole(engine.module.sometimes.weight)
    step(engine, both=False)
    moved = float((whole(engine.module.sometimes.weight) - before).abs().max())
    engine.destroy()
    return moved


def probe(ranks: Ranks) -> dict[str, Any]:
    init_deepspeed_comm()
    found: dict[str, Any] = {
        "moved at stage 2": moved_without_gradient(2),
        "moved at stage 3": moved_without_gradient(3),
        "moved at stage 2 with offload": moved_without_gradient(2, zero={"offload_optimizer": {"device": "cpu"}}),
    }
    engine = initialise(3)
    flat = engine.optimizer.grad_partitions_flat_buffer
    found["flat buffer"] = isinstance(flat, torch.Tensor) and flat.numel() > 0
    step(engine, both=True)
    found["flat buffer has the gradient"] = bool(flat.abs().sum() > 0)
    found["applied"] = step(engine, both=True)
    found["applied where it is not finite"] = step(engine, both=True, factor=float("nan"))
    engine.destroy()

    engine = initialise(2, gradient_accumulation_steps=4)
    for group in engine.basic_optimizer.param_groups:
        group.update(lr=0.0)
    norms = []
    for scale in (True, False):
        engine.backward(engine(torch.ones(1, 4), True), scale_wrt_gas=scale)
        engine.step()
        norms.append(float(engine.optimizer._global_grad_norm))
    found["norms by scale_wrt_gas"] = norms
    engine.destroy()

    engine = initialise(0)
    found["stage 0 applied where it is not finite"] = step(engine, both=True, factor=float("nan"))
    engine.destroy()
    with pytest.raises(NotImplementedError) as caught:
        initialise(0, bf16={"enabled": True})
    found["stage 0 in bfloat16"] = str(caught.value)
    return found


def test_deepspeed_is_what_we_took_it_for() -> None:
    for found in run_ranks(probe, 2, timeout_seconds=240):
        needless = "DeepSpeed has mended this: our cure is needless, take it out"
        assert found["moved at stage 2"] == 0, "ZeRO-2 now applies stale gradients: zero them in Engine.step"
        assert found["moved at stage 3"] > 1e-3, f"{needless} of zero_buffers.forget_kept_gradients"
        assert found["moved at stage 2 with offload"] > 1e-3, f"{needless} (offloaded_sums.forget_sums)"
        assert found["flat buffer"], "grad_partitions_flat_buffer is gone: zero_buffers.forget_kept_gradients needs it"
        assert found["flat buffer has the gradient"], "ZeRO-3 keeps gradients elsewhere: look for stale ones there"
        assert found["applied"], "was_step_applied() is false after an applied step: Engine.step relies on it"
        assert not found["applied where it is not finite"], "a step that is not finite counts as applied"
        scaled, plain = found["norms by scale_wrt_gas"]
        assert plain == pytest.approx(4 * scaled), (
            "scale_wrt_gas=False no longer turns the division off: Engine.backward"
        )
        assert found["stage 0 applied where it is not finite"], f"{needless} (engine/replicated.py), if bf16 works too"
        assert "unsupported mix" in found["stage 0 in bfloat16"], f"{needless} (engine/replicated.py)"
