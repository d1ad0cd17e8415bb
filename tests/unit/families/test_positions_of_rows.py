"""Positions in three parts are made where rows are made, and are those that the model would make."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.families.packs import NAMES
from tests.unit.families.subjects import inputs_of, job, subject

NUMBERED = [name for name in NAMES if subject(name).family.packing == "mrope"]


def test_families_whose_positions_have_three_parts_are_tried() -> None:
    assert {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"} <= set(NUMBERED)


@pytest.mark.parametrize("name", NUMBERED)
def test_the_model_numbers_nothing_and_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = subject(name)
    kinds = ("image", "video")
    asked = [job("wide", "text", "three"), job("text2", "text"), job("clip", "wide", "text"), job("damaged")]
    plain = [one.materialiser(kinds=kinds)(rows) for rows in asked]
    ours = [one.materialiser(kinds=kinds, numbers_tokens=True)(rows) for rows in asked]
    with torch.no_grad():
        wanted = [one.model(**inputs_of(batch), use_cache=False).logits for batch in plain]

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model numbers tokens itself")

    monkeypatch.setattr(type(one.model.model), "get_rope_index", refuse)
    for batch, other, logits in zip(ours, plain, wanted, strict=True):
        assert batch.inputs["position_ids"].shape == (3, *batch.labels.shape)
        assert batch.inputs.keys() - {"position_ids"} == other.inputs.keys()
        with torch.no_grad():
            found = one.model(**inputs_of(batch), use_cache=False).logits
        assert torch.equal(found, logits)


def test_prompts_are_numbered_by_the_model() -> None:
    prompts = subject("qwen2_vl").materialiser(numbers_tokens=True, for_generation=True)(job("wide", "text"))
    assert "position_ids" not in prompts.inputs
