"""Several samples in one row, one after the other, none of which sees another.

A packed row has no attention mask. The borders of its samples go with it, for attention that works by them
(`vlm_dist.model.attention`). Other implementations of transformers find the samples by their positions, which begin
again at 0 with each of them. They look for that only where there is neither a mask nor a key-value cache: with
`use_cache` on, samples would see those before them, without a word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vlm_dist.data.encoding.collate import Example, Padding, RopePositions, join_visual, tokens_of
from vlm_dist.data.types import IGNORE_INDEX, PackBudget
from vlm_dist.errors import ConfigError, SkipSample
from vlm_dist.families import Family

# Shapes: T tokens of the row, t tokens of one sample, N segments


def check_packing(family: Family) -> None:
    """Check that samples of a family can be packed.

    Raises:
        ConfigError: with the reason why not.
    """
    if family.packing is None:
        raise ConfigError(
            f"train.packing is true, but samples for models of the family {family.name} cannot be packed: "
            f"{family.packing_refusal}; set train.packing to false (train.group_by_length pads little, too)"
        )


def pack(
    examples: Sequence[Example], family: Family, rope_positions: RopePositions | None = None
) -> tuple[dict[str, Any], Tensor]:
    """Put samples into one row.

    Args:
        examples: at least one; each becomes a segment.
        family: how positions are told.
        rope_positions: of one sample, for families with "mrope".

    Returns:
        Inputs of the model (`input_ids [1, T]` and the like, `position_ids` [1, T], or [4, 1, T] for "mrope": the
        place in the sample, then the model's own three; visual tensors, joined; no attention mask; see `borders` for
        the rest), and labels [1, T], of which the first of each segment is always `IGNORE_INDEX`.
    """
    keys = dict.fromkeys(key for example in examples for key in example.tokens if key != "attention_mask")
    inputs: dict[str, Any] = {}
    for key in keys:
        inputs[key] = torch.cat([tokens_of(example, key, family) for example in examples]).unsqueeze(0)
    inputs["position_ids"] = torch.cat([_positions(example, family, rope_positions) for example in examples], dim=-1)
    for key in dict.fromkeys(key for example in examples for key in example.visual):
        inputs[key] = join_visual([example.visual[key] for example in examples if key in example.visual])
    labels = torch.cat([example.labels for example in examples])
    inputs |= borders(examples)
    labels[inputs["cu_seq_lens"][:-1].long()] = IGNORE_INDEX
    return inputs, labels.unsqueeze(0)


def filler(examples: Sequence[Example], family: Family, padding: Padding) -> list[Example]:
    """What a pack lacks of the next multiple: padding that is a segment of its own, so that no sample sees it.

    Args:
        examples: the segments so far.
        family: has the pad values.
        padding: with the multiple.

    Returns:
        One row that is no sample, or none.
    """
    length = sum(example.labels.shape[0] for example in examples)
    missing = padding.rounded(length) - length
    if not missing:
        return []
    values = {**family.pad_values, "input_ids": padding.token_id}
    tokens = {key: row.new_full((missing,), values[key]) for key, row in examples[0].tokens.items()}
    labels = torch.full((missing,), IGNORE_INDEX, dtype=examples[0].labels.dtype)
    return [Example(tokens, {}, labels, is_dummy=True)]


def borders(examples: Sequence[Example]) -> dict[str, Any]:
    """Where samples begin and end, told on the host so that nobody has to ask a device.

    Args:
        examples: the N segments of a row.

    Returns:
        `cu_seq_lens`: int32 [N + 1], where each segment begins and the last one ends; `max_seq_len`: the longest, a
        plain number.
    """
    lengths = [example.labels.shape[0] for example in examples]
    return {
        "cu_seq_lens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        "max_seq_len": max(lengths),
    }


def _positions(example: Example, family: Family, rope_positions: RopePositions | None) -> Tensor:
    """Number one sample's tokens: [1, t], or [4, 1, t]."""
    place = torch.arange(example.labels.shape[0]).unsqueeze(0)
    if family.packing != "mrope":
        return place
    assert rope_positions is not None, "packing of this family needs the model's own positions"
    return torch.cat([place, rope_positions(example.tokens, example.visual)]).unsqueeze(1)


class PackRoom:
    """What is left of one pack's budget, sample by sample.

    The real lengths may exceed the planned budget by its headroom. A sample that does not fit beside those before it
    is left out; the first always fits, as it could be in no smaller pack.

    Args:
        budget: of the plan.
    """

    def __init__(self, budget: PackBudget) -> None:
        share = 1 + budget.headroom
        self._max_tokens = budget.max_tokens * share
        self._max_patches = math.inf if budget.max_patches is None else budget.max_patches * share
        self._budget = budget
        self._tokens = self._patches = 0

    def take(self, num_tokens: int, num_patches: int) -> None:
        """Take room for a sample.

        Raises:
            SkipSample: ("over_budget") there is none.
        """
        tokens, patches = self._tokens + num_tokens, self._patches + num_patches
        if self._tokens and (tokens > self._max_tokens or patches > self._max_patches):
            limit = f"{self._budget.max_tokens} tokens"
            if self._budget.max_patches is not None:
                limit += f" and {self._budget.max_patches} patches"
            raise SkipSample(
                "over_budget",
                f"with it its pack has {tokens} tokens and {patches} patches, and more than {limit} with a headroom of "
                f"{self._budget.headroom:.0%}; count the tokens (vlm-dist shards tokens RUN.yaml), so that packs are "
                "planned by what is true",
            )
        self._tokens, self._patches = tokens, patches
