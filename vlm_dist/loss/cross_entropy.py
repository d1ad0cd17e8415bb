"""Cross-entropy from logits: of all positions, where they are there anyway."""

# Shapes: B batch, T tokens, V vocabulary, N = B x T positions

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm_dist.loss.groups import TokenGroups

#: Elements of the largest float32 copy of logits that exists at any time: 128 MiB.
MAX_CHUNK_ELEMENTS = 2**25


def token_loss_sum(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    max_chunk_elements: int = MAX_CHUNK_ELEMENTS,
    groups: TokenGroups | None = None,
) -> Tensor:
    """Sum of cross-entropy over the tokens that carry a label.

    The logits at position t are scored against the label at t + 1. Positions are taken in chunks, forward and
    backward, so that no float32 copy of all logits ever exists: at 8 x 2048 tokens of a vocabulary of 152k it would be
    10 GB, and torch's own cross-entropy keeps another one for its backward.

    Args:
        logits: [B, T, V], any float dtype; read as float32.
        labels: [B, T]; `ignore_index` marks tokens without a label.
        ignore_index: the value of a token without a label (torch's own default).
        max_chunk_elements: upper limit of the elements of a chunk's float32 copy.
        groups: of the tokens that carry a label; their parts of the sum are added to its sums.

    Returns:
        Scalar float32 in nats, of this rank alone, not averaged. Without any label it is 0, and its gradient is 0:
        the graph is kept, so that every parameter takes part in the backward on every rank.

    Raises:
        ValueError: if the leading shapes differ.
    """
    if logits.shape[:-1] != labels.shape or labels.dim() != 2:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not belong together")
    targets = labels.new_full(labels.shape, ignore_index)
    targets[:, :-1] = labels[:, 1:]
    chunk = max(1, max_chunk_elements // logits.shape[-1])
    targets = targets.flatten()
    spread = None if groups is None else groups.spread(targets != ignore_index)
    total: Tensor = _ChunkedCrossEntropySum.apply(logits.flatten(0, 1), targets, ignore_index, chunk, spread)
    return total


class _ChunkedCrossEntropySum(torch.autograd.Function):
    """Cross-entropy that recomputes a chunk's softmax in the backward instead of keeping it."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # [N, V]
        targets: Tensor,  # [N]
        ignore_index: int,
        chunk: int,
        groups: TokenGroups | None,  # of all N positions
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        normalisers = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
        for start in range(0, len(targets), chunk):
            rows = logits[start : start + chunk].float()
            wanted = targets[start : start + chunk]
            carries = wanted != ignore_index
            normaliser = rows.logsumexp(-1)
            picked = rows.gather(-1, wanted.where(carries, 0).unsqueeze(-1)).squeeze(-1)
            # where, not a product: a row without a label may hold NaN (a fully masked dummy), and NaN x 0 is NaN
            losses = torch.where(carries, normaliser - picked, 0.0)
            total += losses.sum()
            if groups is not None:
                groups.add(losses, start)
            normalisers[start : start + chunk] = normaliser
        ctx.save_for_backward(logits, targets, normalisers)
        ctx.ignore_index, ctx.chunk = ignore_index, chunk
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, targets, normalisers = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for start in range(0, len(targets), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            wanted = targets[rows]
            carries = (wanted != ctx.ignore_index).unsqueeze(-1)
            part = (logits[rows].float() - normalisers[rows].unsqueeze(-1)).exp_()
            index = wanted.unsqueeze(-1).where(carries, 0)
            part.scatter_add_(-1, index, torch.full_like(index, -1, dtype=part.dtype))
            part.mul_(grad_output)
            gradient[rows] = torch.where(carries, part, 0.0).to(gradient.dtype)
        return gradient, None, None, None, None
