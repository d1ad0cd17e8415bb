from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.model.conftest import ALL_LORA, ENTRY, lora
from vlm_dist.errors import ModelError
from vlm_dist.loss import token_loss_sum
from vlm_dist.model import (
    attach_adapter,
    enable_gradient_checkpointing,
    find_towers,
    format_tower_table,
    load_model,
    tower_table,
)

LANGUAGE_ONLY = {"vision": "freeze", "projector": "freeze", "language": "lora"}


def lora_modules(model: Any) -> set[str]:
    return {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}


def test_towers_of_qwen2_vl(tiny_model: Any) -> None:
    assert find_towers(tiny_model) == {
        "vision": ("model.visual",),
        "projector": ("model.visual.merger",),
        "language": ("model.language_model",),
        "head": ("lm_head",),
    }


def tiny_llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(text_config=text, vision_config=vision, vision_feature_layer=-2, image_token_index=60)
    return LlavaForConditionalGeneration(config)


def test_llava_has_no_lora_where_no_gradient_comes() -> None:
    model = tiny_llava()
    assert find_towers(model)["projector"] == ("model.multi_modal_projector",)
    adapted = attach_adapter(model, lora(), ALL_LORA)
    layers = {name.split("layers.")[1][0] for name in lora_modules(adapted) if "vision" in name and "layers." in name}
    assert layers == {"0", "1"}  # features come from the layer before the last
    pixels = torch.rand(1, 3, 28, 28)
    ids = torch.tensor([[1, *[model.config.image_token_id] * 4, 2, 3]])
    # B starts at zero, which hides A's gradient: give it a value
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted(input_ids=ids, pixel_values=pixels).logits.sum().backward()
    assert [name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target_modules": ["layers.2.mlp.fc1"]}, r"layers\.2\.mlp\.fc1, which nothing reads"),
        ({"target_modules": r".*vision_tower.*layers\.2\..*"}, "which nothing reads"),
        ({"modules_to_save": ["post_layernorm"]}, r"post_layernorm, which nothing reads"),
    ],
)
def test_what_never_gets_a_gradient_is_refused_when_it_is_asked_for(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        attach_adapter(tiny_llava(), lora(**changes), ALL_LORA)


@pytest.mark.parametrize(
    ("name", "vision", "projector"),
    [
        (
            "Qwen3VLForConditionalGeneration",
            "model.visual",
            {"model.visual.merger", "model.visual.deepstack_merger_list"},
        ),
        ("Glm4vForConditionalGeneration", "model.visual", {"model.visual.merger", "model.visual.downsample"}),
        ("InternVLForConditionalGeneration", "model.vision_tower", {"model.multi_modal_projector"}),
        ("PaliGemmaForConditionalGeneration", "model.vision_tower", {"model.multi_modal_projector"}),
        ("Idefics2ForConditionalGeneration", "model.vision_model", {"model.connector"}),
    ],
)
def test_towers_of_other_families(name: str, vision: str, projector: set[str]) -> None:
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, name).config_class())
    towers = find_towers(model)
    assert towers["vision"] == (vision,) and set(towers["projector"]) == projector
    assert towers["head"] == ("lm_head",) and towers["language"]


@pytest.mark.parametrize("trained", ["vision", "projector", "language"])
def test_the_policy_decides_which_tower_is_trained(tiny_model: Any, trained: str) -> None:
    policy = {tower: "lora" if tower == trained else "freeze" for tower in ALL_LORA}
    adapted = attach_adapter(tiny_model, lora(), policy)
    rows = {row.tower: row for row in tower_table(adapted, policy)}
    assert {name for name, row in rows.items() if row.num_trainable} == {trained, "all"}
    assert rows["all"].num_trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert rows["all"].num_parameters == sum(p.numel() for p in adapted.parameters())
    assert rows[trained].num_lora_modules == len(lora_modules(adapted))
    assert f"{rows['all'].num_trainable:,}" in format_tower_table(list(rows.values()))


def test_all_linear_is_every_linear_layer_but_the_head(tiny_model: Any) -> None:
    linear = {name for name, module in tiny_model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert lora_modules(attach_adapter(tiny_model, lora(), ALL_LORA)) == linear - {"lm_head"}


@pytest.mark.parametrize(
    ("target_modules", "policy", "count"),
    [
        (["q_proj", "v_proj"], ALL_LORA, 4),
        (["proj"], ALL_LORA, 2),  # also the end of the Conv3d patch embedding's name, which stays as it is
        (["language_model.layers.1.mlp.up_proj"], ALL_LORA, 1),
        (r".*layers\.0\..*_proj", LANGUAGE_ONLY, 7),
        (["qkv", "q_proj"], LANGUAGE_ONLY, 2),  # the vision tower's qkv exists, but is frozen
    ],
)
def test_target_modules_by_end_of_name_and_by_regular_expression(
    tiny_model: Any, target_modules: Any, policy: dict[str, str], count: int
) -> None:
    adapted = attach_adapter(tiny_model, lora(target_modules=target_modules), policy)
    assert len(lora_modules(adapted)) == count


@pytest.mark.parametrize(
    ("changes", "policy", "expected"),
    [
        ({"target_modules": "all_linear"}, ALL_LORA, "Did you mean all-linear?"),
        ({"target_modules": ["q_prj"]}, ALL_LORA, "'q_prj' matches no linear layer of the model. Did you mean q_proj?"),
        ({"target_modules": ["q_proj", "wqkv"]}, ALL_LORA, "'wqkv' matches no linear layer"),
        ({"target_modules": "visual.*"}, LANGUAGE_ONLY, r"policy lora \(\['language'\]\)"),
        ({"target_modules": ["qkv"]}, LANGUAGE_ONLY, "'qkv' matches no linear layer of the towers"),
        ({"target_modules": ["lm_head"]}, ALL_LORA, "matches no linear layer of the towers"),
        ({}, dict.fromkeys(ALL_LORA, "freeze"), "nothing to train"),
        ({}, {**ALL_LORA, "vision": "all"}, "vision: got 'all', expected freeze, lora or full"),
        ({"modules_to_save": ["lm_haed"]}, ALL_LORA, "'lm_haed' matches no module of the model. Did you mean lm_head?"),
        ({}, {**ALL_LORA, "audio": "lora"}, "got 'audio', expected one of vision, projector, language"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    tiny_model: Any, changes: dict[str, Any], policy: dict[str, str], expected: str
) -> None:
    with pytest.raises(ModelError, match=expected):
        attach_adapter(tiny_model, lora(**changes), policy)


def test_settings_reach_the_adapter(tiny_model: Any) -> None:
    adapted = attach_adapter(tiny_model, lora(r=8, lora_alpha=4, lora_dropout=0.25, use_rslora=True), LANGUAGE_ONLY)
    layer = adapted.get_base_model().get_submodule("model.language_model.layers.0.mlp.up_proj")
    assert layer.lora_A["default"].weight.shape[0] == 8
    assert layer.scaling["default"] == pytest.approx(4 / 8**0.5)
    assert layer.lora_dropout["default"].p == 0.25


def test_dora_has_magnitudes(tiny_model: Any) -> None:
    adapted = attach_adapter(tiny_model, lora(use_dora=True), LANGUAGE_ONLY)
    assert any("lora_magnitude_vector" in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_bias_all_leaves_frozen_towers_alone(tiny_model: Any) -> None:
    adapted = attach_adapter(tiny_model, lora(bias="all"), LANGUAGE_ONLY)
    biases = {name for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name}
    assert biases and all("language_model" in name for name in biases)


def test_the_adapter_keeps_the_dtype_of_its_layer(tiny_dir: Path) -> None:
    adapted = attach_adapter(load_model(str(tiny_dir), ENTRY, dtype="bfloat16"), lora(), ALL_LORA)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.bfloat16}


def test_the_start_depends_on_the_seed_alone(tiny_dir: Path) -> None:
    def start(seed: int, policy: dict[str, str] = ALL_LORA) -> dict[str, torch.Tensor]:
        model = load_model(str(tiny_dir), ENTRY)
        torch.rand(seed + 3)  # other use of the generators must not matter
        before = torch.random.get_rng_state()
        adapted = attach_adapter(model, lora(), policy, seed)
        assert torch.equal(before, torch.random.get_rng_state())
        return {name: p.detach() for name, p in adapted.named_parameters() if "lora_A" in name}

    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    fewer = start(1, LANGUAGE_ONLY)
    assert len(fewer) < len(first) and all(torch.equal(fewer[name], first[name]) for name in fewer)


@pytest.mark.parametrize("policy", [ALL_LORA, LANGUAGE_ONLY])
def test_a_saved_adapter_loads_with_peft_alone(
    tiny_dir: Path, tmp_path: Path, inputs: dict[str, torch.Tensor], policy: dict[str, str]
) -> None:
    from peft import PeftModel

    adapted = attach_adapter(load_model(str(tiny_dir), ENTRY), lora(), policy).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_model(str(tiny_dir), ENTRY), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, adapted(**inputs).logits)


def gradients(
    tiny_dir: Path, inputs: dict[str, torch.Tensor], policy: dict[str, str], checkpointing: bool
) -> tuple[dict[str, torch.Tensor], bool]:
    """LoRA gradients, and whether the vision tower's output took part in the graph."""
    adapted = attach_adapter(load_model(str(tiny_dir), ENTRY), lora(lora_dropout=0.1), policy, seed=3)
    if checkpointing:
        enable_gradient_checkpointing(adapted)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.01)
    adapted.train()
    seen: list[bool] = []
    visual = adapted.get_base_model().model.visual
    visual.register_forward_hook(lambda module, args, output: seen.append(output.pooler_output.requires_grad))
    torch.manual_seed(0)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    token_loss_sum(adapted(**inputs).logits, labels).backward()
    return {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}, seen[0]


@pytest.mark.parametrize("policy", [ALL_LORA, LANGUAGE_ONLY])
def test_checkpointing_changes_no_bit_of_the_gradients(
    tiny_dir: Path, inputs: dict[str, torch.Tensor], policy: dict[str, str]
) -> None:
    plain, plain_graph = gradients(tiny_dir, inputs, policy, checkpointing=False)
    saving, saving_graph = gradients(tiny_dir, inputs, policy, checkpointing=True)
    assert all(torch.equal(plain[name], saving[name]) and plain[name].abs().sum() > 0 for name in plain)
    # a frozen vision tower stays out of the backward: nobody made its inputs require gradients
    assert plain_graph is saving_graph is (policy["vision"] == "lora")


def test_checkpointing_saves_activations(tiny_dir: Path, inputs: dict[str, torch.Tensor]) -> None:
    def saved_bytes(checkpointing: bool) -> int:
        adapted = attach_adapter(load_model(str(tiny_dir), ENTRY), lora(), ALL_LORA).train()
        if checkpointing:
            enable_gradient_checkpointing(adapted)
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            adapted(**inputs)
        return total

    assert saved_bytes(True) < 0.5 * saved_bytes(False)


def test_checkpointing_comes_after_the_adapter(tiny_model: Any) -> None:
    enable_gradient_checkpointing(tiny_model)
    with pytest.raises(ModelError, match="before gradient checkpointing"):
        attach_adapter(tiny_model, lora(), ALL_LORA)
