"""Variable-length attention at the shapes of real models, by each kernel of the device, beside sample after sample."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_dist.model.attention import kernels
from vlm_dist.model.attention.kernels import attend, kernel_name

#: Heads, heads of keys, width of one: language models of Qwen2-VL-2B and Qwen2.5-VL-7B, and their vision tower.
SHAPES = {"2B": (12, 2, 128), "7B": (28, 4, 128), "tower": (16, 16, 80)}
LENGTHS = {"cuda": (1325, 64, 1, 2047, 830, 3925), "cpu": (19, 5, 1, 32)}  # 8,192 on a GPU
TOLERANCE = 1e-2  # of bfloat16, as a share of the whole


def one_by_one(q: Tensor, k: Tensor, v: Tensor, ends: list[int], causal: bool) -> Tensor:
    """The definition, in the dtype of the inputs: [1, H, T, D] -> [1, T, H, D]."""
    found = []
    for start, end in pairwise(ends):
        part = [tensor[:, :, start:end] for tensor in (q, k, v)]
        found.append(F.scaled_dot_product_attention(*part, is_causal=causal, enable_gqa=True).transpose(1, 2))
    return torch.cat(found, dim=1)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Error as a share of the whole; NaN where there is one."""
    found, wanted = found.detach().float(), wanted.detach().float()
    return float((found - wanted).norm() / wanted.norm())


def use(kernel: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave only one of the kernels, or skip."""
    if kernel == "flash-attn" and (device.type == "cpu" or kernels._flash_attn() is None):
        pytest.skip("flash-attn is not installed, or there is no GPU")
    if kernel == "torch" and (device.type == "cpu" or kernels._torch_varlen() is None):
        pytest.skip("this torch has no torch.nn.attention.varlen, or there is no GPU")
    if kernel != "flash-attn":
        monkeypatch.setattr(kernels, "_flash_attn", lambda: None)
    if kernel == "segments":
        monkeypatch.setattr(kernels, "_torch_varlen", lambda: None)


@pytest.mark.parametrize("kernel", ["flash-attn", "torch", "segments"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_segment_sees_itself_alone(
    device: torch.device, shape: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(kernel, device, monkeypatch)
    heads, key_heads, width = SHAPES[shape]
    lengths = LENGTHS[device.type]
    ends = [sum(lengths[:count]) for count in range(len(lengths) + 1)]
    causal = shape != "tower"
    torch.manual_seed(0)
    inputs = [torch.randn(1, count, ends[-1], width, device=device) for count in (heads, key_heads, key_heads)]
    outer = torch.randn(1, ends[-1], heads, width, device=device)
    exact = [tensor.clone().requires_grad_() for tensor in inputs]
    wanted = one_by_one(*exact, ends, causal)
    wanted.backward(outer)
    rounded = [tensor.to(torch.bfloat16).requires_grad_() for tensor in inputs]
    borders = torch.tensor(ends, dtype=torch.int32, device=device)
    found = attend(*rounded, borders, max(lengths), is_causal=causal, scale=width**-0.5)
    found.backward(outer.to(torch.bfloat16))
    assert found.shape == wanted.shape and relative(found, wanted) < TOLERANCE
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert relative(ours.grad, theirs.grad) < TOLERANCE


def test_a_gpu_has_a_kernel(device: torch.device) -> None:
    """In half precision; in float32 there is none, and no harm."""
    name = kernel_name(device, torch.bfloat16)
    assert ("SDPA" in name) == (device.type == "cpu"), name
    assert "SDPA" in kernel_name(device, torch.float32)
