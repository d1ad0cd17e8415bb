from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm_dist.loss import token_loss_sum

pytestmark = pytest.mark.filterwarnings("error")


def reference(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def batch(rows: int, tokens: int, share: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 100 + tokens)
    logits = torch.randn(rows, tokens, 37, generator=generator).mul(3).to(dtype).requires_grad_()
    labels = torch.randint(37, (rows, tokens), generator=generator)
    return logits, labels.masked_fill(torch.rand(rows, tokens, generator=generator) > share, -100)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 9), st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from([1, 37, 100, 10**6]))
def test_value_and_gradient_are_those_of_torch(rows: int, tokens: int, share: float, chunk: int) -> None:
    logits, labels = batch(rows, tokens, share)
    loss = token_loss_sum(logits, labels, max_chunk_elements=chunk)
    (ours,) = torch.autograd.grad(loss * 0.5, logits)
    expected = reference(logits, labels)
    (theirs,) = torch.autograd.grad(expected * 0.5, logits)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bfloat16_logits_are_read_as_float32() -> None:
    logits, labels = batch(3, 50, 1.0, torch.bfloat16)
    loss = token_loss_sum(logits, labels, max_chunk_elements=64)
    loss.backward()
    assert loss.dtype is torch.float32 and logits.grad is not None and logits.grad.dtype is torch.bfloat16
    torch.testing.assert_close(loss, reference(logits, labels), rtol=1e-6, atol=0)


def test_without_labels_the_loss_is_zero_and_keeps_its_graph() -> None:
    logits, labels = batch(2, 5, 0.0)
    loss = token_loss_sum(logits, labels)
    assert loss.item() == 0.0
    loss.backward()
    assert logits.grad is not None and torch.equal(logits.grad, torch.zeros_like(logits))


def test_a_row_without_labels_may_hold_anything() -> None:
    """The attention of a fully masked row may give NaN."""
    logits, labels = batch(2, 5, 1.0)
    labels[1] = -100
    spoilt = logits.detach().clone()
    spoilt[1] = torch.nan
    spoilt.requires_grad_()
    loss = token_loss_sum(spoilt, labels)
    loss.backward()
    assert loss.item() == pytest.approx(reference(logits, labels).item(), rel=1e-6)
    assert spoilt.grad is not None and torch.isfinite(spoilt.grad).all()


def test_no_float32_copy_of_all_logits_is_kept() -> None:
    logits, labels = batch(4, 64, 1.0, torch.bfloat16)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_loss_sum(logits, labels)
    assert max(tensor.numel() for tensor in saved if tensor.dtype is torch.float32) <= labels.numel()


def test_shapes_must_belong_together() -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        token_loss_sum(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))
