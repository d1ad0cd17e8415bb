"""From samples to one micro-batch: token keys are padded, visual tensors are joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlm_dist.data.types import IGNORE_INDEX
from vlm_dist.errors import DataError
from vlm_dist.families import Family

# Shapes: B rows, T tokens of the longest row, t tokens of one row


@dataclass(slots=True)
class Example:
    """One row.

    Attributes:
        tokens: keys with one entry per token, [t] each.
        visual: visual tensors, joined over the rows on dim 0.
        labels: [t].
        kinds: what it shows, of "image" and "video".
        is_dummy: the row is no sample; nothing of it counts.
    """

    tokens: dict[str, Tensor]
    visual: dict[str, Tensor]
    labels: Tensor
    kinds: frozenset[str] = frozenset()
    is_dummy: bool = False


@dataclass(frozen=True, slots=True)
class Padding:
    """How rows become equally long.

    Attributes:
        token_id: of the tokenizer's pad token.
        side: "right" for training, "left" for generation.
        enabled: False refuses samples of different lengths; dummy rows are padded nevertheless.
        carries_loss: padding is learned (`mask_pad_token: false`).
    """

    token_id: int
    side: Literal["left", "right"] = "right"
    enabled: bool = True
    carries_loss: bool = False


def collate(examples: Sequence[Example], family: Family, padding: Padding) -> tuple[dict[str, Tensor], Tensor]:
    """Merge rows.

    Args:
        examples: at least one.
        family: has the pad values.
        padding: how rows become equally long.

    Returns:
        Inputs of the model (`input_ids [B, T]` and the like, visual tensors), and labels [B, T].

    Raises:
        DataError: rows differ in length, but padding is off.
    """
    lengths = [example.labels.shape[0] for example in examples]
    longest = max(lengths)
    own = [example.labels.shape[0] for example in examples if not example.is_dummy]
    if not padding.enabled and len(set(own)) > 1:
        raise DataError(
            f"text_processing.padding is false, but a micro-batch has samples of {min(own)} to {max(own)} tokens; "
            "set it to true"
        )
    inputs: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for example in examples for key in example.tokens):
        value = padding.token_id if key == "input_ids" else family.pad_values[key]
        rows = [
            _pad(example.tokens.get(key, torch.full((length,), value)), longest, value, padding.side)
            for example, length in zip(examples, lengths, strict=True)
        ]
        inputs[key] = torch.stack(rows)
    for key in dict.fromkeys(key for example in examples for key in example.visual):
        inputs[key] = _join([example.visual[key] for example in examples if key in example.visual])
    labels = torch.stack(
        [
            _pad(
                example.labels,
                longest,
                padding.token_id if padding.carries_loss and not example.is_dummy else IGNORE_INDEX,
                padding.side,
            )
            for example in examples
        ]
    )
    labels[:, 0] = IGNORE_INDEX
    return inputs, labels


def _pad(row: Tensor, length: int, value: int, side: str) -> Tensor:
    missing = length - row.shape[0]
    if missing == 0:
        return row
    filler = torch.full((missing,), value, dtype=row.dtype)
    return torch.cat([row, filler] if side == "right" else [filler, row])


def _join(tensors: Sequence[Tensor]) -> Tensor:
    """Join on dim 0; where the other dims differ, the smaller are filled with zeros at their ends."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    filled = []
    for tensor in tensors:
        if list(tensor.shape[1:]) == shape:
            filled.append(tensor)
            continue
        larger = tensor.new_zeros((tensor.shape[0], *shape))
        larger[tuple(slice(size) for size in tensor.shape)] = tensor
        filled.append(larger)
    return torch.cat(filled)
