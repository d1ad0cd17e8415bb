"""What the policy of towers promises, on a tiny checkpoint of every family."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from tests.unit.model.conftest import ALL_LORA, lora
from tests.unit.model.zoo import FAMILIES, Kind, kind, move, trained
from vlm_dist.checkpoint import export_adapter
from vlm_dist.checkpoint.store import CheckpointStore
from vlm_dist.model import attach_adapter, enable_gradient_checkpointing, find_towers, tower_table
from vlm_dist.model.towers import without_gradient

PROJECTOR = {"vision": "freeze", "projector": "full", "language": "lora"}
VISION = {"vision": "full", "projector": "lora", "language": "lora"}
LANGUAGE = {"vision": "lora", "projector": "lora", "language": "full"}
ALL_FULL = dict.fromkeys(ALL_LORA, "full")


def gradients(one: Kind, model: nn.Module) -> dict[str, Tensor | None]:
    """Of a loss over all positions, so that whatever reaches any logit counts."""
    torch.manual_seed(0)
    one.logits(model.train()).float().square().mean().backward()
    return {name: parameter.grad for name, parameter in trained(model).items()}


@pytest.mark.parametrize("policy", [ALL_LORA, ALL_FULL], ids=["lora", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_whatever_is_trained_gets_a_gradient(name: str, policy: dict[str, str]) -> None:
    """B is zero at the start, which hides A's gradient but not its own."""
    one = kind(name)
    found = gradients(one, attach_adapter(one.load(), lora(), policy))
    counts = [key for key in found if "lora_A" not in key]
    assert counts and [key for key in counts if found[key] is None or not found[key].any()] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    one = kind(name)
    found = []
    for checkpointing in (False, True):
        model = attach_adapter(one.load(), lora(lora_dropout=0.1), VISION | {"projector": "full"})
        move(model)
        if checkpointing:
            enable_gradient_checkpointing(model)
        found.append(gradients(one, model))
    plain, saving = found
    assert all(gradient is not None for gradient in plain.values())
    for key, gradient in plain.items():
        torch.testing.assert_close(saving[key], gradient, rtol=1e-5, atol=1e-7, msg=key)


def save(model: nn.Module, directory: Path) -> Any:
    """Publish as a run does; gives adapter_config.json."""
    masters = {name: parameter.detach() for name, parameter in trained(model).items()}
    CheckpointStore(directory).save_adapter(export_adapter(model, masters, torch.float32))
    return json.loads((directory / "adapter" / "adapter_config.json").read_text())


def same_with_peft_alone(one: Kind, directory: Path, changes: dict[str, Any], policy: dict[str, str]) -> Any:
    """Train a little, save, load with PEFT into a new base; gives adapter_config.json."""
    model = attach_adapter(one.load(), lora(**changes), policy).eval()
    with torch.no_grad():
        start = one.logits(model)
        move(model)
        wanted = one.logits(model)
        config = save(model, directory)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = PeftModel.from_pretrained(one.load(), directory / "adapter").eval()
        torch.testing.assert_close(one.logits(loaded), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - start).abs().max() > 1e-2
    return config


@pytest.mark.parametrize("policy", [PROJECTOR, VISION, LANGUAGE], ids=["projector", "vision", "language"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_tower_trained_in_full_loads_with_peft_alone(name: str, policy: dict[str, str], tmp_path: Path) -> None:
    one = kind(name)
    config = same_with_peft_alone(one, tmp_path, {}, policy)
    assert config["modules_to_save"]
    modules = dict(one.load().named_modules())
    assert set(config["modules_to_save"]) <= set(modules)  # full names
    assert not any(isinstance(modules[listed], nn.ModuleList) for listed in config["modules_to_save"])


@pytest.mark.parametrize("changes", [{"bias": "all"}, {"bias": "lora_only"}, {"use_dora": True}, {"use_rslora": True}])
@pytest.mark.parametrize("name", ["qwen3_vl", "llava_next", "internvl", "mllama"])
def test_variants_of_lora_load_with_peft_alone(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    same_with_peft_alone(kind(name), tmp_path, changes, VISION | {"vision": "lora"})


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3"])  # the head of gemma3 is tied to its embeddings
@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_embeddings_and_head_may_be_trained_beside_the_adapter(name: str, modules: list[str], tmp_path: Path) -> None:
    one = kind(name)
    config = same_with_peft_alone(one, tmp_path, {"modules_to_save": modules}, ALL_LORA)
    tied = name == "gemma3"
    assert {listed.rsplit(".", 1)[-1] for listed in config["modules_to_save"]} == (
        {"lm_head", "embed_tokens"} if tied else set(modules)
    )


def test_a_module_that_is_trained_in_full_has_no_lora() -> None:
    model = attach_adapter(kind("qwen2_vl").load(), lora(modules_to_save=["mlp", "lm_head"]), ALL_LORA)
    assert {row.tower: row.policy for row in tower_table(model, ALL_LORA)} == ALL_LORA | {"head": "part", "all": ""}
    names = set(trained(model))
    assert any(name.endswith("layers.0.mlp.up_proj.weight") for name in names)
    assert not any(".mlp." in name and "lora_" in name for name in names)


@pytest.mark.parametrize("name", ["llava_next", "llava_next_video", "llava_onevision"])
def test_a_parameter_of_the_model_itself_is_trained_with_its_projector(name: str, tmp_path: Path) -> None:
    """PEFT cannot list it, and puts it into its place all the same."""
    one = kind(name)
    model = attach_adapter(one.load(), lora(), PROJECTOR)
    move(model)
    config = save(model, tmp_path)
    assert not any("newline" in listed for listed in config["modules_to_save"])
    loaded = PeftModel.from_pretrained(one.load(), tmp_path / "adapter")
    wanted = model.get_base_model().model.image_newline
    assert torch.equal(loaded.get_base_model().model.image_newline, wanted)
    assert not torch.equal(one.load().model.image_newline, wanted)


def test_a_full_tower_is_not_copied() -> None:
    one = kind("internvl")
    base = one.load()
    before = sum(parameter.numel() for parameter in base.parameters())
    model = attach_adapter(base, lora(), VISION)
    added = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    assert sum(parameter.numel() for parameter in model.parameters()) == before + added
    assert all(parameter.requires_grad for parameter in model.get_base_model().model.vision_tower.parameters())


def test_without_lora_there_is_no_adapter(tmp_path: Path) -> None:
    one = kind("qwen2_vl")
    model = attach_adapter(one.load(), lora(), ALL_FULL | {"vision": "freeze"})
    assert not isinstance(model, PeftModel)
    assert "lm_head.weight" in trained(model)  # the head goes with the language model
    assert not any("visual.blocks" in name for name in trained(model))
    masters = {name: parameter.detach() for name, parameter in trained(model).items()}
    export = export_adapter(model, masters, torch.bfloat16)
    assert export.config is None and set(export.outside) == set(trained(model))


def test_heads_that_pool_a_picture_are_left_out() -> None:
    """As in SigLIP, where a checkpoint has one: no language model reads it."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = SiglipVisionConfig(**small, image_size=28, patch_size=14, vision_use_head=True)
    text = LlamaConfig(vocab_size=64, **small)
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=60,
    )
    model = LlavaForConditionalGeneration(config)
    unread = without_gradient(model, find_towers(model))
    assert {name.rsplit(".", 1)[-1] for name in unread} == {"head", "post_layernorm"}
    tuned = attach_adapter(model, lora(), ALL_FULL)
    ids = torch.tensor([[1, *[60] * 4, 2, 3]])
    tuned(input_ids=ids, pixel_values=torch.rand(1, 3, 28, 28)).logits.square().mean().backward()
    assert [name for name, parameter in trained(tuned).items() if parameter.grad is None] == []
