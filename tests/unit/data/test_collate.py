"""Rows of different lengths become one micro-batch; visual tensors are joined."""

import pytest
import torch

from vlm_dist.data.encoding.collate import Example, Padding, attach_dummies, collate
from vlm_dist.data.types import IGNORE_INDEX
from vlm_dist.errors import DataError
from vlm_dist.families import GENERIC, family_for

LLAVA, PALIGEMMA = family_for("llava"), family_for("paligemma")


def example(*ids, visual=None, is_dummy=False, **tokens):
    row = torch.tensor(ids)
    return Example(
        {"input_ids": row, "attention_mask": torch.ones_like(row), **tokens},
        visual or {},
        row.clone(),
        is_dummy=is_dummy,
    )


def test_padding_right_and_left():
    rows = [example(1, 2, 3), example(4)]
    inputs, labels = collate(rows, GENERIC, Padding(0))
    assert inputs["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert labels.tolist() == [[IGNORE_INDEX, 2, 3], [IGNORE_INDEX] * 3]
    inputs, _ = collate(rows, GENERIC, Padding(9, side="left"))
    assert inputs["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_padding_that_is_learned():
    rows = [example(1, 2, 3), example(4), example(5, is_dummy=True)]
    _, labels = collate(rows, GENERIC, Padding(0, carries_loss=True))
    assert labels[:2].tolist() == [[IGNORE_INDEX, 2, 3], [IGNORE_INDEX, 0, 0]]
    assert labels[2].tolist() == [IGNORE_INDEX] * 3


def test_without_padding_samples_must_be_equally_long():
    collate([example(1, 2), example(3, 4)], GENERIC, Padding(0, enabled=False))
    with pytest.raises(DataError, match="1 to 2 tokens; set it to true"):
        collate([example(1, 2), example(3)], GENERIC, Padding(0, enabled=False))


def test_visual_tensors_are_joined_in_row_order_and_filled_with_zeros():
    rows = [
        example(1, visual={"pixel_values": torch.full((2, 1, 2), 1.0)}),
        example(2),
        example(3, visual={"pixel_values": torch.full((1, 2, 1), 2.0)}),
    ]
    inputs, _ = collate(rows, GENERIC, Padding(0))
    assert inputs["pixel_values"].tolist() == [[[1, 1], [0, 0]], [[1, 1], [0, 0]], [[2, 0], [2, 0]]]


def test_a_key_that_only_some_rows_have():
    rows = [example(1, 2, token_type_ids=torch.tensor([0, 1])), example(3)]
    inputs, _ = collate(rows, GENERIC, Padding(0))
    assert inputs["token_type_ids"].tolist() == [[0, 1], [0, 0]]


def test_dummies_take_the_place_of_padding_behind_the_shortest_row():
    picture = {"pixel_values": torch.ones(1, 2), "grid": torch.ones(1, 3)}
    rows = [example(1, 2, 3, 4), example(5), example(9, 9, visual=picture, is_dummy=True)]
    attached = attach_dummies(rows, LLAVA, Padding(0))
    assert [row.tokens["input_ids"].tolist() for row in attached] == [[1, 2, 3, 4], [5, 9, 9]]
    assert attached[1].labels.tolist() == [5, 9, 9]
    assert attached[1].visual.keys() == picture.keys()
    assert not attached[1].is_dummy
    for family, padding in (
        (PALIGEMMA, Padding(0)),  # sees forwards, too
        (LLAVA, Padding(0, side="left")),  # the end of a prompt is where generation goes on
        (LLAVA, Padding(0, enabled=False)),  # one row would be longer than the others
    ):
        assert attach_dummies(rows, family, padding) == rows
    nothing_else = [example(7, is_dummy=True), example(9, is_dummy=True)]
    (row,) = attach_dummies(nothing_else, LLAVA, Padding(0, enabled=False))
    assert row.tokens["input_ids"].tolist() == [7, 9]
    assert row.is_dummy
