"""Finds the answers where a processor does not tell what it did to the text: by the tokens of the text as it was."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

import torch
from torch import Tensor

from vlm_dist.errors import SkipSample


def align_answers(plain_ids: Sequence[int], plain_answers: Tensor, input_ids: Tensor, is_visual: Tensor) -> Tensor:
    """Carry the answers over from the tokens of the text to those of the text with its placeholders expanded.

    Processors put tokens in, and change what stands beside a placeholder; the rest stays in its order.

    Args:
        plain_ids: tokens of the text before the expansion, P of them.
        plain_answers: bool [P].
        input_ids: int64 [T], what the processor made of it.
        is_visual: bool [T], which of them stand for media.

    Returns:
        bool [T].

    Raises:
        SkipSample: ("bad_sample") a token of an answer is not found again.
    """
    places = (~is_visual).nonzero().flatten()
    matcher = SequenceMatcher(None, list(plain_ids), input_ids[places].tolist(), autojunk=False)
    answers = torch.zeros_like(is_visual)
    num_found = 0
    for block in matcher.get_matching_blocks():
        marked = plain_answers[block.a : block.a + block.size]
        answers[places[block.b : block.b + block.size]] = marked
        num_found += int(marked.sum())
    if num_found != int(plain_answers.sum()):
        raise SkipSample("bad_sample", "the processor changes the text so much that its answers are not found again")
    return answers
