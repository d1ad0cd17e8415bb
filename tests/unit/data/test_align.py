"""Answers are carried over to what a processor made of the text, or the sample is left out."""

from __future__ import annotations

import pytest
import torch

from vlm_dist.data.encoding.align import align_answers
from vlm_dist.errors import SkipSample

IMAGE, AROUND, SPACE = 900, 901, 902


def aligned(plain, answers, made):
    ids = torch.tensor(made)
    marks = torch.tensor([place in answers for place in range(len(plain))])
    return align_answers(plain, marks, ids, ids == IMAGE).nonzero().flatten().tolist()


def test_tokens_that_were_put_in_move_the_answers_behind_them():
    made = [1, AROUND, IMAGE, IMAGE, AROUND, SPACE, 5, 6, 7, 8]
    assert aligned([1, IMAGE, 5, 6, 7, 8], {4, 5}, made) == [8, 9]
    # images between two answers, of which the second repeats the first
    plain = [1, IMAGE, 5, 7, 8, 1, IMAGE, 5, 7, 8]
    made = [1, AROUND, IMAGE, IMAGE, AROUND, 5, 7, 8, 1, AROUND, IMAGE, IMAGE, AROUND, 5, 7, 8]
    assert aligned(plain, {3, 4, 8, 9}, made) == [6, 7, 14, 15]


def test_answers_that_are_not_found_again_cost_the_sample():
    with pytest.raises(SkipSample, match="not found again"):
        aligned([1, IMAGE, 5, 6, 7], {4}, [1, IMAGE, 5, 6, 9])
