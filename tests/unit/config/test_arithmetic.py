from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_dist.config import BatchArithmetic, TrainConfig, resolve_batch, resolve_interval
from vlm_dist.errors import ConfigError


def train(per_device: int, accumulation: int = 1) -> TrainConfig:
    return TrainConfig(per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation)


def test_at_the_first_start_the_global_batch_follows() -> None:
    assert resolve_batch(train(8, 2), world_size=4) == BatchArithmetic(64, 8, 2, 4)


@given(per_device=st.integers(1, 16), accumulation=st.integers(1, 8), before=st.integers(1, 16), now=st.integers(1, 16))
def test_the_global_batch_survives_another_number_of_ranks(
    per_device: int, accumulation: int, before: int, now: int
) -> None:
    first = resolve_batch(train(per_device, accumulation), before)
    resumed = resolve_batch(train(per_device), now, first.global_batch_size, allow_idle=True)
    assert resumed.global_batch_size == first.global_batch_size
    slots = resumed.accumulation * now
    assert slots >= first.num_micro_batches > slots - now
    assert resumed.idle_share == pytest.approx(1 - first.num_micro_batches / slots)


def test_accumulation_makes_up_for_missing_ranks() -> None:
    assert resolve_batch(train(4, 2), 4, 64).accumulation == 4
    assert resolve_batch(train(4, 2), 16, 64).accumulation == 1


def test_a_world_size_that_does_not_fit() -> None:
    with pytest.raises(ConfigError) as error:
        resolve_batch(train(4), 8, 100)
    assert str(error.value) == (
        "the checkpoint's global batch of 100 samples is not a multiple of 4 x 8 (per_device_train_batch_size x world "
        "size); nearest: 96, 128"
    )
    batch = resolve_batch(train(4), 8, 100, allow_idle=True)
    assert (batch.accumulation, batch.num_micro_batches) == (4, 25)
    assert str(batch) == "global batch 100 = 4 per device x 4 accumulation x 8 ranks (22% of it empty)"


def test_a_micro_batch_that_does_not_fit_is_refused_even_then() -> None:
    with pytest.raises(ConfigError, match=r"not a multiple of 8 .*nearest: 96, 104; .* to 5 or 10"):
        resolve_batch(train(8), 2, 100, allow_idle=True)


def test_packs_fit_any_number_of_ranks() -> None:
    packed = TrainConfig(per_device_train_batch_size=8, gradient_accumulation_steps=2, packing=True)
    assert str(resolve_batch(packed, 3)) == "global batch 48 = 8 per device x 2 accumulation x 3 ranks"
    resumed = resolve_batch(packed, 5, 100)
    assert (resumed.global_batch_size, resumed.idle_share) == (100, 0)
    assert str(resumed) == "global batch 100, in packs, over 5 ranks"


def test_nearest_is_never_zero() -> None:
    with pytest.raises(ConfigError, match=r"nearest: 32$"):
        resolve_batch(train(4), 8, 16)


@pytest.mark.parametrize(
    ("value", "total", "steps"),
    [(0, 100, 0), (0.1, 100, 10), (0.1, 30, 3), (0.1, 5, 1), (0.1, 0, 0), (7, 100, 7), (1, 100, 1), (200, 100, 200)],
)
def test_intervals(value: float, total: int, steps: int) -> None:
    assert resolve_interval(value, total) == steps


@given(share=st.integers(1, 999).map(lambda n: n / 1000), total=st.integers(1, 10**6))
def test_a_share_is_rounded_up_exactly(share: float, total: int) -> None:
    thousandths = round(share * 1000)
    assert resolve_interval(share, total) == -(-thousandths * total // 1000)
