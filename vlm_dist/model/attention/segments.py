"""Attention segment by segment: exact on every device and in every dtype, with no scores between segments.

A compiler cannot follow a loop whose length is in a tensor: it sees one operation, whose backward computes each
segment once more.
"""

# Shapes: T tokens of the row, H heads, K heads of keys and values, D width of one head, N segments

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: In the place of None, which the type of an operation's number cannot be.
NO_WINDOW = 0


def attend_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    *,
    is_causal: bool,
    scale: float,
    window: int = NO_WINDOW,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of each segment over itself.

    Args:
        query: [1, H, T, D].
        key: [1, K, T, D]; K divides H.
        value: [1, K, T, D].
        cu_seq_lens: int32 [N + 1], from 0 to T.
        is_causal: tokens see those before them alone.
        scale: of the scores.
        window: how many tokens, its own included, each sees at most; `NO_WINDOW`: all. For causal attention.
        dropout: share of the weights that are dropped.

    Returns:
        [1, T, H, D].
    """
    if not torch.compiler.is_compiling():
        return _loop(query, key, value, cu_seq_lens, is_causal, scale, window, dropout)
    if dropout:
        raise NotImplementedError("attention that drops weights segment by segment is no operation of a compiled block")
    out: Tensor = _segment_attention(query, key, value, cu_seq_lens, is_causal, scale, window)
    return out


def _loop(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_lens: Tensor, causal: bool, scale: float, window: int, drop: float
) -> Tensor:
    lengths = host_lengths(cu_seq_lens)
    pieces = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([_one(q, k, v, causal, scale, window, drop).transpose(1, 2) for q, k, v in pieces], dim=1)


def _one(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int, dropout: float) -> Tensor:
    """One segment, [1, H, t, D]; the same call as transformers' for a sample that is alone in its row."""
    length = q.shape[2]
    mask = None
    if causal and window != NO_WINDOW and length > window:
        mask = _visible(length, window, q.device)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None and length > 1,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _visible(length: int, window: int, device: torch.device) -> Tensor:
    """Whether a token (first dimension) sees another, [t, t]."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen if window == NO_WINDOW else seen.triu(1 - window)


#: Borders of the row that is computed now, where they are on a device, and its lengths.
_told: tuple[Any, list[int]] | None = None


def host_lengths(cu_seq_lens: Tensor) -> list[int]:
    """Lengths of the segments, [N]. A device is asked once for a row, whatever the number of its layers."""
    global _told
    if _told is not None and _told[0]() is cu_seq_lens:
        return _told[1]
    ends = cu_seq_lens.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    if not cu_seq_lens.is_cpu:
        _told = weakref.ref(cu_seq_lens), lengths
    return lengths


@torch.library.custom_op("vlm_dist::segment_attention", mutates_args=())
def _segment_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_lens: Tensor, is_causal: bool, scale: float, window: int
) -> Tensor:
    return _loop(query, key, value, cu_seq_lens, is_causal, scale, window, 0.0)


@_segment_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_lens: Tensor, is_causal: bool, scale: float, window: int
) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1])


@torch.library.custom_op("vlm_dist::segment_attention_backward", mutates_args=())
def _segment_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    is_causal: bool,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = host_lengths(cu_seq_lens)
    tensors = (gradient.transpose(1, 2), query, key, value)
    pieces = zip(*(tensor.split(lengths, dim=2) for tensor in tensors), strict=True)
    found = [_one_backward(outer, q, k, v, is_causal, scale, window) for outer, q, k, v in pieces]
    d_query, d_key, d_value = (torch.cat(parts, dim=2) for parts in zip(*found, strict=True))
    return d_query, d_key, d_value


def _one_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of `_one`, in float32: within an operation there is no autograd to ask."""
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    outer, query = gradient.float(), q.float()
    keys, values = (tensor.float().repeat_interleave(groups, dim=1) for tensor in (k, v))
    scores = query @ keys.transpose(2, 3) * scale
    if causal:
        scores.masked_fill_(~_visible(length, window, q.device), -torch.inf)
    weights = scores.softmax(dim=-1)
    d_values = weights.transpose(2, 3) @ outer
    d_weights = outer @ values.transpose(2, 3)
    d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True)) * scale
    d_keys = d_scores.transpose(2, 3) @ query
    d_key, d_value = (tensor.unflatten(1, (-1, groups)).sum(2).to(k.dtype) for tensor in (d_keys, d_values))
    return (d_scores @ keys).to(q.dtype), d_key, d_value


@_segment_attention_backward.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    is_causal: bool,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.is_causal, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _segment_attention_backward(gradient, *ctx.saved_tensors, ctx.is_causal, ctx.scale, ctx.window)
    return (*gradients, None, None, None, None)


_segment_attention.register_autograd(_backward, setup_context=_save)
