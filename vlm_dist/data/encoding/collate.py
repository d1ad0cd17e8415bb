"""From samples to one micro-batch: token keys are padded, visual tensors are joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlm_dist.data.types import IGNORE_INDEX
from vlm_dist.errors import DataError
from vlm_dist.families import Family

#: Numbers the tokens of one sample as its model does: tokens [t] each, visual tensors -> int64 [3, t].
RopePositions = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]

# Shapes: B rows, T tokens of the longest row (or the next multiple that is asked for), t tokens of one row


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
        carries_loss: padding up to the longest row is learned (`mask_pad_token: false`).
        multiple: of which the common length is one; what is added for that is never learned.
    """

    token_id: int
    side: Literal["left", "right"] = "right"
    enabled: bool = True
    carries_loss: bool = False
    multiple: int = 1

    def rounded(self, length: int) -> int:
        """The next multiple."""
        return -(-length // self.multiple) * self.multiple


def attach_dummies(examples: Sequence[Example], family: Family, padding: Padding) -> list[Example]:
    """Put dummies behind the shortest sample, in the place of padding: rows of their own cost as much as any other.

    What comes later in a row changes nothing of what comes before, and nobody looks at a dummy's own outcome. Only for
    rows that are padded at their ends, of families whose tokens are known to see backwards alone.

    Args:
        examples: samples, then dummies.
        family: knows which way its tokens see.
        padding: how rows become equally long.

    Returns:
        One row less for each dummy; the same rows where that cannot be done.
    """
    dummies = [example for example in examples if example.is_dummy]
    rows = [example for example in examples if not example.is_dummy] or dummies[:1]
    added = [dummy for dummy in dummies if dummy is not rows[0]]
    sees_backwards = family.packing is not None
    if not added or not sees_backwards or padding.side == "left" or not (padding.enabled or len(rows) == 1):
        return list(examples)
    shortest = min(range(len(rows)), key=lambda row: rows[row].labels.shape[0])
    rows[shortest] = _concatenate([rows[shortest], *added], family)
    return rows


def _concatenate(parts: Sequence[Example], family: Family) -> Example:
    """Make one row of several."""
    keys = dict.fromkeys(key for part in parts for key in part.tokens)
    tokens = {key: torch.cat([tokens_of(part, key, family) for part in parts]) for key in keys}
    names = dict.fromkeys(key for part in parts for key in part.visual)
    visual = {key: join_visual([part.visual[key] for part in parts if key in part.visual]) for key in names}
    labels = torch.cat([part.labels for part in parts])
    kinds = frozenset(kind for part in parts for kind in part.kinds)
    return Example(tokens, visual, labels, kinds, is_dummy=parts[0].is_dummy)


def tokens_of(example: Example, key: str, family: Family) -> Tensor:
    """A key with one entry per token; the family's value of padding where the row has none."""
    if key in example.tokens:
        return example.tokens[key]
    return torch.full_like(example.tokens["input_ids"], family.pad_values[key])


def collate(
    examples: Sequence[Example], family: Family, padding: Padding, rope_positions: RopePositions | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Merge rows.

    Args:
        examples: at least one.
        family: has the pad values.
        padding: how rows become equally long.
        rope_positions: the model's own of one row; None: the model numbers the tokens, for which it has to ask its
            device how large the pictures are.

    Returns:
        Inputs of the model (`input_ids [B, T]` and the like, `position_ids` [3, B, T] where they are asked for, visual
        tensors), and labels [B, T].

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
    width = padding.rounded(longest)
    inputs: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for example in examples for key in example.tokens):
        value = padding.token_id if key == "input_ids" else family.pad_values[key]
        rows = [_pad(tokens_of(example, key, family), width, value, padding.side) for example in examples]
        inputs[key] = torch.stack(rows)
    if rope_positions is not None:
        positions = [rope_positions(example.tokens, example.visual) for example in examples]
        inputs["position_ids"] = torch.stack([_pad(one, width, 0, padding.side) for one in positions], dim=1)
    for key in dict.fromkeys(key for example in examples for key in example.visual):
        inputs[key] = join_visual([example.visual[key] for example in examples if key in example.visual])
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
    labels = _pad(labels, width, IGNORE_INDEX, padding.side)
    labels[:, 0] = IGNORE_INDEX
    return inputs, labels


def _pad(row: Tensor, length: int, value: int, side: str) -> Tensor:
    """Make the last dimension so long."""
    missing = length - row.shape[-1]
    if missing == 0:
        return row
    filler = torch.full((*row.shape[:-1], missing), value, dtype=row.dtype)
    return torch.cat([row, filler] if side == "right" else [filler, row], dim=-1)


def join_visual(tensors: Sequence[Tensor]) -> Tensor:
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
