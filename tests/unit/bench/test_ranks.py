"""The arithmetic of waiting ranks, by hand."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from tests.bench.lengths import MixLengths
from tests.bench.ranks.__main__ import TooSlowError, within
from tests.bench.ranks.batches import OurSteps, Setting, TrainerSteps, step_costs
from tests.bench.ranks.figures import Figures, TimeModel

TOKENS, TILES = np.array([10, 20, 30, 40]), np.array([1, 0, 2, 0])


def test_padded_and_packed_costs() -> None:
    padded = step_costs([[[0, 1], [2, 3]]], TOKENS, TILES, is_packed=False)
    assert padded.useful.tolist() == [[30, 70]] and padded.computed.tolist() == [[40, 80]]
    assert padded.squares.tolist() == [[800, 3200]] and padded.tiles.tolist() == [[1, 2]]
    packed = step_costs([[[0, 1], [2, 3]]], TOKENS, TILES, is_packed=True)
    assert packed.computed.tolist() == [[30, 70]] and packed.squares.tolist() == [[500, 2500]]
    assert packed.useful_squares == padded.useful_squares == 3000


def test_shares_of_two_ranks() -> None:
    rows = [[[0], [3]], [[2], [1]]]  # rank 0: 10 and 30; rank 1: 40 and 20
    step = step_costs(rows, TOKENS, TILES, is_packed=True)
    found = Figures.of([step], TimeModel(token=1.0, pair=0.0, tile=10.0), 0.5)
    assert found.padding == 0.0
    assert found.max_over_mean == pytest.approx(60 / 50)
    assert found.useful == pytest.approx(100 / (2 * 60))
    assert found.useful_each == pytest.approx(100 / (2 * (40 + 30)))
    assert found.useful_time == pytest.approx((100 + 30) / (2 * (40 + 50)))
    assert found.tiles_max_over_mean == pytest.approx(3 / 1.5)


def every_sample_once(steps: Any, num_samples: int) -> None:
    seen = [sample for rows in steps for row in rows for batch in row for sample in batch]
    assert len(seen) == len(set(seen)) and len(seen) > 0.9 * num_samples
    assert all(0 <= sample < num_samples for sample in seen)


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "batch_rebalance"])
def test_trainers_steps(strategy: str) -> None:
    setting = Setting(world_size=3, per_device=2, accumulation=2)
    lengths = np.random.default_rng(0).integers(10, 1000, 500).tolist()
    steps = list(TrainerSteps(strategy, lengths, setting))
    assert all(len(rows) == 2 and all(len(row) == 3 for row in rows) for rows in steps)
    assert all(sum(len(batch) for row in rows for batch in row) == setting.batch for rows in steps)
    every_sample_once(steps, 500)


def test_rebalancing_is_dealt_as_its_sampler_deals() -> None:
    from transformers.trainer_pt_utils import BatchRebalanceSampler

    lengths = np.random.default_rng(1).integers(10, 1000, 240).tolist()
    ours = next(iter(TrainerSteps("batch_rebalance", lengths, Setting(4, 3, 2))))
    for rank in range(4):
        sampler = BatchRebalanceSampler(lengths, 24, 4, 2, rank=rank, seed=0)
        assert [sorted(one) for one, _ in zip(sampler, range(2), strict=False)] == [sorted(row[rank]) for row in ours]


@pytest.mark.parametrize("mode", ["padding", "group_by_length", "packing"])
def test_our_steps(mode: Any) -> None:
    steps = list(OurSteps(mode, MixLengths("mix", 1 << 12), Setting(4, 4, 2), 10_000))
    every_sample_once(steps, 10_000)


def test_the_time_model_is_that_of_a_7b_model() -> None:
    model = TimeModel.of_true_size()
    assert 24e9 < model.token < 32e9  # four times 6.5e9 weights, LoRA, a head at a fifth of the positions
    assert model.pair == pytest.approx(28 * 3584 * 6)
    assert 1.2e12 < model.tile < 1.8e12  # twice 0.63e9 weights for 1,024 patches, and attention


def test_what_takes_too_long_is_given_up() -> None:
    with pytest.raises(TooSlowError), within(0.1):
        time.sleep(5)
