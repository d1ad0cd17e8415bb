"""A frozen vision tower costs a step one forward: no backward runs through it, and nothing of it is recomputed.

What torch counts cannot be told apart by module in the backward. So a step is compared with one that is handed what the
tower gave before, and computes everything else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.families.subjects import inputs_of, job, subject
from tests.unit.model.counted import EVERYWHERE, FAMILIES, LANGUAGE, measured, trained
from vlm_dist.data.types import MicroBatch
from vlm_dist.model.towers import find_towers


def tower_of(model: Any) -> Any:
    base = model.get_base_model()
    return base.get_submodule(find_towers(base)["vision"][0])


@contextmanager
def given_before(model: Any, batch: MicroBatch) -> Iterator[int]:
    """Within, the tower computes nothing; gives the operations of its forward."""
    tower = tower_of(model)
    forward, given = tower.forward, []

    def noted(*args: Any, **kwargs: Any) -> Any:
        given.append(forward(*args, **kwargs))
        return copy.copy(given[-1])  # models write into it

    def counted() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(**inputs_of(batch), use_cache=False)
        return int(counter.get_total_flops())

    tower.forward = noted
    whole = counted()
    calls = 0

    def again(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return copy.copy(given[(calls - 1) % len(given)])

    tower.forward = again
    try:
        yield whole - counted()
    finally:
        tower.forward = forward


@pytest.mark.parametrize(("name", "recomputed"), [*((name, True) for name in FAMILIES), ("qwen2_vl", False)])
def test_a_frozen_tower_costs_its_forward(name: str, recomputed: bool) -> None:
    one = subject(name)
    batch = one.materialiser()(job("wide", "text", "tall"))
    model = trained(one, LANGUAGE, recomputed=recomputed)
    model.get_base_model().enable_input_require_grads()  # as PEFT and transformers do by themselves
    step = measured(model, batch)
    with given_before(model, batch) as forward:
        assert forward > 0
        assert step - measured(model, batch) == forward


def test_one_that_learns_costs_more() -> None:
    one = subject("qwen2_vl")
    batch = one.materialiser()(job("wide", "text", "tall"))
    costs = []
    for recomputed in (False, True):
        model = trained(one, EVERYWHERE, recomputed=recomputed)
        step = measured(model, batch)
        with given_before(model, batch) as forward:
            costs.append((step - measured(model, batch)) / forward)
    assert 1.3 < costs[0] < costs[1] - 0.2
