"""Fused layers compute what PEFT's do: outputs, gradients, dropout; and what is not plain LoRA stays PEFT's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vlm_dist.model.fused_lora import fuse_lora


class Block(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20, bias=bias)
        self.down = nn.Linear(20, 12, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def adapted(dtype: torch.dtype = torch.float64, bias: bool = True, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["up", "down"], **settings)
    model = get_peft_model(Block(bias).to(dtype), config, autocast_adapter_dtype=False).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def outcome(model: Any, x: Tensor) -> dict[str, Tensor]:
    """The output and every gradient."""
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **gradients}


class Calls(TorchDispatchMode):
    """Counts additions and multiplications of whole outputs."""

    def __init__(self, num_elements: int) -> None:
        super().__init__()
        self.num_elements = num_elements
        self.passes: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("add", "mul", "add_", "mul_") and out.numel() >= self.num_elements:
            self.passes.append(str(func))
        return out


@pytest.mark.parametrize("shape", [(7, 12), (1, 5, 12), (2, 3, 5, 12)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"lora_dropout": 0.3}, {"use_rslora": True}, {"bias": "all"}],
    ids=["plain", "dropout", "rs", "bias"],
)
def test_outputs_and_gradients_are_those_of_peft(shape: tuple[int, ...], settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    plain = copy.deepcopy(model)
    assert fuse_lora(model) == 2
    x = torch.randn(shape, dtype=torch.float64)
    ours, theirs = outcome(model, x), outcome(plain, x)
    assert ours.keys() == theirs.keys() and any("lora_A" in name for name in ours)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-12, msg=name)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_nothing_is_scaled_or_added_apart() -> None:
    model = adapted(bias=False)
    plain = copy.deepcopy(model)
    fuse_lora(model)
    x = torch.randn(5, 12, dtype=torch.float64)
    layer, unfused = model.base_model.model.up, plain.base_model.model.up
    with torch.no_grad(), Calls(5 * 20) as ours:
        layer(x)
    with torch.no_grad(), Calls(5 * 20) as theirs:
        unfused(x)
    assert ours.passes == [] and len(theirs.passes) == 2


def test_in_bfloat16_it_is_nearer_to_the_truth() -> None:
    x = torch.randn(64, 12)
    truth = outcome(adapted(torch.float64), x.bfloat16().double())["out"]
    model = adapted(torch.bfloat16)
    plain = copy.deepcopy(model)
    fuse_lora(model)
    ours, theirs = ((one(x.bfloat16()).double() - truth).abs().mean() for one in (model, plain))
    assert ours <= theirs * 1.01


def test_switched_off_and_merged_layers_are_the_base() -> None:
    model = adapted()
    fuse_lora(model)
    x = torch.randn(3, 12, dtype=torch.float64)
    learned = model(x)
    with model.disable_adapter():
        base = model(x)
    torch.testing.assert_close(base, model.base_model.model.up.base_layer.weight.new_tensor(adapted_base(x)))
    assert not torch.allclose(base, learned)
    model.merge_adapter()
    torch.testing.assert_close(model(x), learned, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False))
    model.set_adapter("other")
    assert not torch.allclose(model(x), learned)
    model.set_adapter("default")
    torch.testing.assert_close(model(x), learned)


def adapted_base(x: Tensor) -> Any:
    torch.manual_seed(0)
    return Block(True).double()(x).detach().numpy()


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "lora_bias"])
def test_what_is_not_plain_is_left_alone(settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    before = outcome(model, x := torch.randn(3, 12, dtype=torch.float64))
    assert fuse_lora(model) == 0
    after = outcome(model, x)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_partitioned_weights_are_left_to_their_modules() -> None:
    model = adapted()
    fuse_lora(model)
    x = torch.randn(3, 12, dtype=torch.float64)
    expected = model(x)
    called = []
    up = model.base_model.model.up.lora_B["default"]
    up.weight.ds_id = 1  # as DeepSpeed marks what it has partitioned, after the layer was made
    up.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert called
    assert fuse_lora(adapted_marked()) == 0


def adapted_marked() -> Any:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.ds_id = 1
    return model


def test_a_copy_uses_its_own_weights() -> None:
    model = adapted()
    fuse_lora(model)
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    x = torch.randn(3, 12, dtype=torch.float64)
    with twin.disable_adapter():
        base = twin(x)
    torch.testing.assert_close(twin(x), base)
    assert not torch.allclose(model(x), base)
