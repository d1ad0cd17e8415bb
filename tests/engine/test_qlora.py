"""A base in 4 bits: gradients are those of a base with the unpacked weights, and ZeRO-1 and -2 train alike.

Runs where bitsandbytes is installed (`pip install 'vlm-dist[qlora]'`).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine import tiny
from tests.ranks import Ranks, run_ranks
from tests.unit.model.conftest import ENTRY
from vlm_dist.config import PeftConfig
from vlm_dist.engine import Engine, zero_init_context
from vlm_dist.errors import ConfigError, ModelError
from vlm_dist.model import attach_adapter, check_quantization, load_model, quantization_arguments, tower_table
from vlm_dist.optim import parameter_groups

pytestmark = pytest.mark.engine

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install 'vlm-dist[qlora]'",
)
LORA = {"vision": "lora", "projector": "lora", "language": "lora"}
SETTINGS = PeftConfig(r=4, lora_alpha=8, lora_dropout=0.0)
STEPS = [[tiny.micro_batch(10 * step + index) for index in range(4)] for step in range(2)]


def packed(directory: Path, dtype: torch.dtype) -> Any:
    return load_model(str(directory), ENTRY, quantization_arguments("nf4", dtype), dtype=dtype)


def unpacked(directory: Path, dtype: torch.dtype) -> Any:
    """The same values in a base that is not packed."""
    import bitsandbytes.functional as functional

    model = load_model(str(directory), ENTRY, dtype=dtype)
    with torch.no_grad():
        for name, layer in packed(directory, dtype).named_modules():
            if hasattr(layer.__dict__.get("_parameters", {}).get("weight"), "quant_state"):
                weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
                model.get_submodule(name).weight.copy_(weight)
    return model


def stir(model: nn.Module) -> nn.Module:
    """B is not zero, so that A has a gradient."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny_vlm(tmp_path_factory.mktemp("qlora") / "model")


@needs_bitsandbytes
@pytest.mark.parametrize("changes", [{}, {"use_dora": True, "bias": "all"}])
def test_gradients_are_those_of_the_unpacked_weights(directory: Path, changes: dict[str, Any]) -> None:
    settings = SETTINGS.model_copy(update=changes)
    found: list[dict[str, Tensor]] = []
    counted = []
    layer = "model.language_model.layers.0.mlp.up_proj"
    inputs, labels = STEPS[0][0]
    for load in (packed, unpacked):
        model = stir(attach_adapter(load(directory, torch.float32), settings, LORA))
        tiny.token_loss_sum(model(**inputs).logits, labels).backward()
        model.eval()
        with torch.no_grad():
            model(**inputs)  # an evaluation in between must not spoil the packed weights
        model.train()
        tiny.token_loss_sum(model(**inputs).logits, labels).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        counted.append(tower_table(model))
    assert counted[0] == counted[1]  # weights, not bytes
    original = load_model(str(directory), ENTRY, dtype=torch.float32).get_submodule(layer).weight
    assert packed(directory, torch.float32).get_submodule(layer).weight.dtype is torch.uint8
    assert (unpacked(directory, torch.float32).get_submodule(layer).weight - original).norm() / original.norm() > 0.01
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def train(ranks: Ranks, directory: Path) -> dict[Any, Any]:
    found = {}
    for stage, bf16 in ((1, False), (2, False), (2, True)):
        config = tiny.ds_config(stage, ranks.world_size, bf16=bf16)
        dtype = torch.bfloat16 if bf16 else torch.float32
        with zero_init_context(config):
            model = stir(attach_adapter(packed(directory, dtype), SETTINGS, LORA))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        engine = Engine.initialise(model, tiny.adamw, parameter_groups(model, 0.0), tiny.schedule, config)
        for batches in STEPS:
            tiny.run_step(engine, batches[ranks.rank :: ranks.world_size], tiny.num_targets(batches))
        state = engine.collect_trainable()
        found[stage, bf16] = state and {name: one.master.numpy() for name, one in state.parameters.items()}
        engine.close()
    return found


@needs_bitsandbytes
def test_zero_1_and_2_train_the_adapter_alike(directory: Path) -> None:
    model = stir(attach_adapter(unpacked(directory, torch.float32), SETTINGS, LORA))
    optimizer = tiny.adamw(parameter_groups(model, 0.0))
    for index, batches in enumerate(STEPS):
        optimizer.param_groups[0]["lr"] = tiny.LEARNING_RATE * tiny.schedule(index)
        for inputs, labels in batches:
            (tiny.token_loss_sum(model(**inputs).logits, labels) / tiny.num_targets(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found = run_ranks(train, 2, directory, timeout_seconds=120)[0]
    for name, wanted in model.named_parameters():
        if wanted.requires_grad:
            for case, (rtol, atol) in {
                (1, False): (1e-3, 1e-3),
                (2, False): (1e-3, 1e-3),
                (2, True): (0.2, 2e-2),
            }.items():
                got = torch.from_numpy(found[case][name])
                torch.testing.assert_close(got, wanted.detach(), rtol=rtol, atol=atol, msg=f"{case} {name}")


@needs_bitsandbytes
def test_packed_modules_are_not_trained_in_full(directory: Path) -> None:
    settings = SETTINGS.model_copy(update={"modules_to_save": ("merger",)})
    with pytest.raises(ModelError, match="cannot be trained in full beside"):
        attach_adapter(packed(directory, torch.float32), settings, LORA)


def test_zero_3_and_a_missing_library_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="does not work under ZeRO-3"):
        check_quantization("nf4", 3)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'vlm-dist\[qlora\]'"):
        check_quantization("nf4", 2)
    check_quantization("none", 3)
