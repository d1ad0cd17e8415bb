"""Which blocks are computed again in the backward, what that saves, and what a frozen tower costs there: nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.model.conftest import ALL_LORA, ENTRY, SHAPE, lora
from tests.unit.model.zoo import FAMILIES, kind
from vlm_dist.demo.tiny_model import TinyShape, save_tiny_qwen2_vl
from vlm_dist.errors import ModelError
from vlm_dist.loss import token_loss_sum
from vlm_dist.model import attach_adapter, enable_gradient_checkpointing, load_model, run_frozen_towers_without_graph
from vlm_dist.model.checkpointing import chosen_blocks

LANGUAGE_ONLY = {"vision": "freeze", "projector": "freeze", "language": "lora"}


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [("all", [0, 1, 2, 3, 4]), ("none", []), (2, [0, 1]), (9, [0, 1, 2, 3, 4]), (0, []), ("every-2", [0, 2, 4])],
)
def test_a_policy_means_these_blocks(policy: str | int, chosen: list[int]) -> None:
    assert chosen_blocks(policy, 5) == chosen


def four_layers(tmp_path: Path, vision_depth: int = 2) -> Path:
    shape = TinyShape(**{**vars(SHAPE), "num_layers": 4, "vision_depth": vision_depth})
    return save_tiny_qwen2_vl(tmp_path / f"depth-{vision_depth}", shape, dtype=torch.float32)


def load(directory: Path, policy: dict[str, str] = ALL_LORA, **changes: Any) -> Any:
    model = attach_adapter(load_model(str(directory), ENTRY), lora(lora_dropout=0.1, **changes), policy, seed=3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.01)
    return model.train()


def run(model: Any, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Gradients, and the bytes that the forward kept for the backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = token_loss_sum(model(**inputs, use_cache=False).logits, labels)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return gradients, sum(size for pointer, size in kept.items() if pointer not in weights)


def test_every_policy_gives_the_same_bits_and_saves_as_much_as_it_says(
    tmp_path: Path, inputs: dict[str, Tensor]
) -> None:
    directory = four_layers(tmp_path)
    plain, all_kept = run(load(directory), inputs)
    kept = {}
    for language in ("none", 1, "every-2", 3, "all"):
        model = load(directory)
        told = enable_gradient_checkpointing(model, language=language, vision="none")
        assert [str(one) for one in told] == [
            f"language: {len(chosen_blocks(language, 4))} of 4 blocks",
            "vision: 0 of 2 blocks",
        ]
        gradients, kept[language] = run(model, inputs)
        assert set(gradients) == set(plain) and all(torch.equal(gradients[name], plain[name]) for name in plain)
    assert kept["none"] == all_kept
    saved = {language: all_kept - size for language, size in kept.items()}
    assert 0 < saved[1] < saved["every-2"] < saved[3] < saved["all"]
    assert saved["every-2"] == pytest.approx(saved["all"] / 2, rel=0.1)
    model = load(directory)
    enable_gradient_checkpointing(model, language="none", vision="all")
    _, with_vision_alone = run(model, inputs)
    assert with_vision_alone < all_kept


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_blocks_in_both_towers(name: str) -> None:
    one = kind(name)
    model = one.load()
    by_tower = {told.tower: told for told in enable_gradient_checkpointing(model, language=1, vision="none")}
    assert by_tower["language"].num_checkpointed == 1 and by_tower["language"].num_blocks >= 2
    assert by_tower["vision"].num_checkpointed == 0 and by_tower["vision"].num_blocks >= 1
    frozen = attach_adapter(one.load(), lora(), LANGUAGE_ONLY)
    by_tower = {told.tower: told for told in enable_gradient_checkpointing(frozen)}
    assert by_tower["vision"].is_frozen and by_tower["vision"].num_checkpointed == 0
    assert run_frozen_towers_without_graph(frozen)


def test_code_that_checkpoints_all_or_nothing_is_told_apart(tiny_model: Any) -> None:
    class Remote(torch.nn.Module):
        gradient_checkpointing = False

        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

    tiny_model.model.language_model = Remote()
    with pytest.raises(ModelError, match=r"gradient_checkpointing_policy\.language: got 1, .* all or none"):
        enable_gradient_checkpointing(tiny_model, language=1)
    (language, _) = enable_gradient_checkpointing(tiny_model)
    assert language.num_checkpointed == 1


@pytest.fixture(params=[False, True], ids=["kept", "recomputed"])
def recomputed(request: pytest.FixtureRequest) -> Iterator[bool]:
    yield request.param


def backward_flops(model: Any, inputs: dict[str, Tensor], recomputed: bool) -> int:
    if recomputed:
        enable_gradient_checkpointing(model)
    run_frozen_towers_without_graph(model)
    loss = model(**inputs, use_cache=False).logits.square().sum()
    with FlopCounterMode(display=False) as flops:
        loss.backward()
    return flops.get_total_flops()


def test_the_backward_of_a_frozen_tower_costs_nothing(
    tmp_path: Path, inputs: dict[str, Tensor], recomputed: bool
) -> None:
    shallow, deep = (four_layers(tmp_path, depth) for depth in (1, 6))
    counts = [backward_flops(load(one, LANGUAGE_ONLY), inputs, recomputed) for one in (shallow, deep)]
    assert counts[0] == counts[1] > 0
    counts = [backward_flops(load(one), inputs, recomputed) for one in (shallow, deep)]
    assert counts[1] > 1.5 * counts[0]


def vision_output_has_graph(model: Any, inputs: dict[str, Tensor]) -> bool:
    seen: list[bool] = []
    model.get_base_model().model.visual.register_forward_hook(
        lambda module, args, output: seen.append(output.pooler_output.grad_fn is not None)
    )
    model(**inputs, use_cache=False).logits.sum().backward()
    return seen[0]


def test_hooks_on_the_inputs_do_not_wake_a_frozen_tower(
    tiny_dir: Path, inputs: dict[str, Tensor], recomputed: bool
) -> None:
    for guarded in (False, True):
        model = load(tiny_dir, LANGUAGE_ONLY)
        if recomputed:
            enable_gradient_checkpointing(model)
        if guarded:
            assert run_frozen_towers_without_graph(model) == ["model.visual"]
        model.get_base_model().enable_input_require_grads()  # as PEFT and transformers do by themselves
        assert vision_output_has_graph(model, inputs) is not guarded


@pytest.mark.parametrize(
    ("settings", "without_graph"),
    [
        ({"policy": {**LANGUAGE_ONLY, "projector": "lora"}}, ["model.visual.blocks.0", "model.visual.blocks.1"]),
        ({"target_modules": r".*blocks\.1\..*|.*q_proj", "policy": ALL_LORA}, ["model.visual.blocks.0"]),
        ({"policy": ALL_LORA}, []),
        ({"policy": LANGUAGE_ONLY, "modules_to_save": ["patch_embed"]}, []),
    ],
)
def test_what_is_trained_within_the_tower_keeps_its_gradient(
    tiny_dir: Path, inputs: dict[str, Tensor], recomputed: bool, settings: dict[str, Any], without_graph: list[str]
) -> None:
    plain, _ = run(load(tiny_dir, **settings), inputs)
    model = load(tiny_dir, **settings)
    if recomputed:
        enable_gradient_checkpointing(model)
    assert run_frozen_towers_without_graph(model) == without_graph
    gradients, _ = run(model, inputs)
    assert set(gradients) == set(plain) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)
    assert vision_output_has_graph(model, inputs)
