"""peft_config.yaml: each key changes what is trained, or how."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.test_key_effects.conftest import Project
from tests.unit.test_key_effects.registry import shows
from vlm_dist.model import attach_adapter, format_tower_table, load_model, tower_rates, tower_table
from vlm_dist.optim import make_optimizer, parameter_groups


def adapted(project: Project, changes: dict[str, Any] | None = None) -> Any:
    """The model as the composition root adapts it."""
    config = project.config(changes)
    loading = config.model.loading_for(config.model_id)
    model = load_model(config.model_id, config.model_entry, loading, dtype="float32")
    return attach_adapter(model, config.peft, config.peft.towers.model_dump(), seed=config.train.seed)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    found = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert found
    return found


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@shows("peft.r")
def test_r_is_the_rank(project: Project) -> None:
    for r in (2, 5):
        for layer in lora_layers(adapted(project, {"peft.r": r})).values():
            assert layer.lora_A["default"].weight.shape[0] == layer.lora_B["default"].weight.shape[1] == r


@shows("peft.lora_alpha", "peft.use_rslora")
def test_alpha_scales_the_update(project: Project) -> None:
    """By alpha / r, or with rslora by alpha / sqrt(r): seen in the layer's output, not in an attribute."""

    def update(**changes: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model = adapted(
            project, {"peft.r": 4, "peft.lora_dropout": 0.0, **{f"peft.{k}": v for k, v in changes.items()}}
        )
        layer = next(iter(lora_layers(model).values()))
        nn.init.ones_(layer.lora_B["default"].weight)
        x = torch.ones(1, layer.in_features)
        return (layer(x) - layer.base_layer(x)).detach()

    one = update(lora_alpha=4)
    torch.testing.assert_close(update(lora_alpha=12), 3 * one, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(update(lora_alpha=4, use_rslora=True), 2 * one, rtol=1e-4, atol=1e-4)  # 4/2, not 4/4


@shows("peft.lora_dropout")
def test_dropout_hits_the_adapters_input(project: Project) -> None:
    layer = next(iter(lora_layers(adapted(project, {"peft.lora_dropout": 0.25})).values()))
    torch.manual_seed(0)
    dropped = layer.train().lora_dropout["default"](torch.ones(10_000))
    assert (dropped == 0).float().mean() == pytest.approx(0.25, abs=0.02)
    layer = next(iter(lora_layers(adapted(project, {"peft.lora_dropout": 0.0})).values()))
    assert (layer.train().lora_dropout["default"](torch.ones(100)) == 1).all()


@shows("peft.bias")
def test_bias_says_which_biases_are_trained(project: Project) -> None:
    biases = {
        bias: {name for name in trained(adapted(project, {"peft.bias": bias})) if name.endswith("bias")}
        for bias in ("none", "lora_only", "all")
    }
    assert not biases["none"]
    assert biases["lora_only"] and all("base_layer" in name for name in biases["lora_only"])
    assert biases["lora_only"] < biases["all"]  # norms have biases, but no LoRA


@shows("peft.use_dora")
def test_dora_trains_magnitudes(project: Project) -> None:
    assert not any("magnitude" in name for name in trained(adapted(project)))
    assert any("magnitude" in name for name in trained(adapted(project, {"peft.use_dora": True})))


@shows("peft.target_modules")
def test_target_modules_are_those_with_lora(project: Project) -> None:
    named = lora_layers(adapted(project, {"peft.target_modules": ["q_proj", "up_proj"]}))
    assert {name.rsplit(".", 1)[-1] for name in named} == {"q_proj", "up_proj"}
    matched = lora_layers(adapted(project, {"peft.target_modules": r".*layers\.0\..*k_proj"}))
    assert len(matched) == 1
    assert len(lora_layers(adapted(project))) > len(named)  # all-linear


@shows("peft.towers.vision", "peft.towers.projector", "peft.towers.language")
@pytest.mark.parametrize(
    ("tower", "inside"), [("vision", ".visual.blocks."), ("projector", ".merger."), ("language", ".language_model.")]
)
def test_a_tower_is_frozen_or_has_lora_or_is_trained_in_full(project: Project, tower: str, inside: str) -> None:
    def of_tower(policy: str) -> set[str]:
        return {name for name in trained(adapted(project, {f"peft.towers.{tower}": policy})) if inside in name}

    assert of_tower("freeze") == set()
    assert of_tower("lora") and all("lora_" in name for name in of_tower("lora"))
    assert of_tower("full") and not any("lora_" in name for name in of_tower("full"))


@shows("peft.modules_to_save")
def test_modules_to_save_are_trained_in_full(project: Project) -> None:
    more = trained(adapted(project, {"peft.modules_to_save": ["lm_head", "norm1"]})) - trained(adapted(project))
    assert {name.rsplit(".", 2)[-2] for name in more} == {"lm_head", "norm1"}


@shows("peft.towers_learning_rate.vision", "peft.towers_learning_rate.projector", "peft.towers_learning_rate.language")
def test_towers_have_learning_rates_of_their_own(project: Project) -> None:
    changes = {"peft.towers_learning_rate": {"vision": 1e-6, "projector": 2e-6}, "train.learning_rate": 5e-5}
    config, model = project.config(changes), adapted(project, changes)
    rates = tower_rates(model, config.peft.towers_learning_rate.model_dump())
    optimizer = make_optimizer(config.train, parameter_groups(model, 0.1, rates))
    found = {
        name.split("base_model.model.model.")[1].split(".lora_")[0]: group["lr"]
        for group in optimizer.param_groups
        for name, parameter in model.named_parameters()
        if any(parameter is one for one in group["params"])
    }
    assert {rate for name, rate in found.items() if name.startswith("language_model.")} == {5e-5}
    assert {rate for name, rate in found.items() if ".merger." in name} == {2e-6}
    assert {rate for name, rate in found.items() if ".blocks." in name} == {1e-6}
    assert optimizer.param_groups[0]["lr"] == 5e-5  # the log tells the first group's
    table = format_tower_table(tower_table(model, None, 5e-5, config.peft.towers_learning_rate.model_dump()))
    assert [line.split()[-1] for line in table.splitlines()[1:4]] == ["1e-06", "2e-06", "5e-05"]


@shows("peft.task_type")
def test_the_task_type_decides_the_class_that_loads_the_adapter(project: Project) -> None:
    model = adapted(project)
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert model.peft_config["default"].task_type == "CAUSAL_LM"
