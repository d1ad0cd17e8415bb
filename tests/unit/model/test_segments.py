"""Attention segment by segment is attention under a mask: few heads of keys, windows, every length, every kernel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm_dist.model.attention import kernels
from vlm_dist.model.attention.segments import NO_WINDOW, _segment_attention, attend_segments, host_lengths

LENGTHS = [5, 1, 12, 3, 9]
BORDERS = torch.tensor([0, 5, 6, 18, 21, 30], dtype=torch.int32)
CASES = [
    pytest.param(heads, causal, window, id=f"{heads} heads of keys, {'causal' if causal else 'all'}, window {window}")
    for heads, causal, window in [
        (4, True, NO_WINDOW), (2, True, NO_WINDOW), (1, True, 4), (2, True, 1), (4, False, NO_WINDOW), (2, True, 12),
    ]
]  # fmt: skip


def tensors(key_heads: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, heads, 30, 8, dtype=dtype, generator=generator) for heads in (4, key_heads, key_heads)]
    q, k, v = (tensor.requires_grad_() for tensor in made)
    return q, k, v


def under_a_mask(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, scale: float) -> Tensor:
    """The definition: all pairs, of which those between segments are left out. [1, T, H, D]."""
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(30)
    seen = owner[:, None] == owner[None, :]
    if causal:
        seen &= place[:, None] >= place[None, :]
    if window != NO_WINDOW:
        seen &= place[:, None] - place[None, :] < window
    k, v = (tensor.repeat_interleave(4 // tensor.shape[1], dim=1) for tensor in (k, v))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~seen, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize(("key_heads", "causal", "window"), CASES)
def test_segments_are_blocks_of_the_mask(key_heads: int, causal: bool, window: int) -> None:
    """As a loop, and as the one operation that a compiler sees."""
    q, k, v = tensors(key_heads)
    outer = torch.randn(1, 30, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = under_a_mask(q, k, v, causal, window, 0.3)
    gradients = torch.autograd.grad(wanted, (q, k, v), outer)
    for found in (
        attend_segments(q, k, v, BORDERS, is_causal=causal, scale=0.3, window=window),
        _segment_attention(q, k, v, BORDERS, causal, 0.3, window),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        for ours, theirs in zip(torch.autograd.grad(found, (q, k, v), outer), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_operation_is_one_that_a_compiler_can_have() -> None:
    q, k, v = tensors(2, torch.float32)
    torch.library.opcheck(_segment_attention, (q, k, v, BORDERS, True, 0.3, 4))


def test_dropout_is_of_the_weights_within_a_segment() -> None:
    q, k, _ = tensors(4)
    ones = torch.ones_like(k)
    torch.manual_seed(0)
    out = attend_segments(q, k, ones, BORDERS, is_causal=True, scale=0.3, dropout=0.5)
    assert set(out[0, 5, :, 0].tolist()) <= {0.0, 2.0}  # alone in its segment: all of it or nothing
    assert 0.7 < float(out.detach().mean()) < 1.3


class OnDevice(Tensor):
    """Says that it is not on the host, and counts how often it is asked."""

    asked = 0

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def tolist(self) -> list[int]:
        OnDevice.asked += 1
        return torch.Tensor.tolist(self.as_subclass(torch.Tensor))


def test_a_device_is_asked_once_for_a_row() -> None:
    row, other = (BORDERS.clone().as_subclass(OnDevice) for _ in range(2))
    assert [host_lengths(row), host_lengths(row), host_lengths(other), host_lengths(other)] == [LENGTHS] * 4
    assert OnDevice.asked == 2


def test_kernels_are_told_what_a_window_is_and_the_borders_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to a kernel, tried with one that computes the definition."""
    calls: list[dict[str, Any]] = []

    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        **more: Any,
    ) -> Tensor:
        assert cu_seq_q is cu_seq_k and max_q == max_k == 12
        calls.append(more)
        back, ahead = more["window_size"]
        window = NO_WINDOW if back < 0 else back + 1
        q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
        return under_a_mask(q, k, v, ahead == 0, window, more["scale"])[0]

    def with_fewer_heads(*args: Any, enable_gqa: bool = False, **more: Any) -> Tensor:
        return varlen_attn(*args, enable_gqa=enable_gqa, **more)

    for call, takes in ((varlen_attn, False), (with_fewer_heads, True)):
        kernels._torch_varlen.cache_clear()
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", call)
        kernel = kernels._torch_varlen()
        assert kernel is not None
        monkeypatch.setattr(kernels, "_kernel_for", lambda *_, kernel=kernel: kernel)
        for causal, window, sizes in ((True, NO_WINDOW, (-1, 0)), (True, 4, (3, 0)), (False, NO_WINDOW, (-1, -1))):
            q, k, v = tensors(2)
            found = kernels.attend(q, k, v, BORDERS, 12, is_causal=causal, scale=0.3, window=window)
            torch.testing.assert_close(found, under_a_mask(q, k, v, causal, window, 0.3))
            assert calls[-1]["window_size"] == sizes
            assert calls[-1].get("enable_gqa", False) == takes
    kernels._torch_varlen.cache_clear()


def test_on_a_cpu_no_kernel_is_chosen() -> None:
    q, k, v = tensors(4, torch.bfloat16)
    assert kernels._kernel_for(q, k, v, 0.0) is None
    assert kernels.kernel_name(torch.device("cpu"), torch.bfloat16) == "SDPA sample by sample (CPU)"
    assert kernels.kernel_name(torch.device("cuda"), torch.float32) == "SDPA sample by sample (float32)"
    assert kernels.kernel_name(torch.device("cuda"), torch.bfloat16) == "torch.nn.attention.varlen"
