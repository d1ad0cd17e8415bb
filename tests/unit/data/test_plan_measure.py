"""What a plan costs, and that the batching modes keep what they promise on hard mixes of lengths."""

import numpy as np
import pytest

from tests.bench.batching import measure_batching
from tests.bench.lengths import MIXES, draw
from tests.unit.data.plan_sources import FakeSource
from vlm_dist.data.lengths import Costs
from vlm_dist.data.plan.measure import measure
from vlm_dist.data.plan.plan import Plan, PlanSettings
from vlm_dist.data.types import SampleRef, StepPlan


class Lengths:
    """Row r has 10 r tokens and r patches."""

    digest, mixes_all = "rows", True

    def costs(self, source, rows):
        rows = np.asarray(rows)
        return Costs(10 * rows, rows, np.zeros_like(rows))


def test_the_measures_are_what_they_are_called():
    plan = Plan([FakeSource([10])], [1.0], PlanSettings(4, 2), Lengths())
    refs = [SampleRef(0, row) for row in (1, 3, 2, 2, 5)]
    step = StepPlan(0, 1.0, ((refs[0], refs[1]), (refs[2], refs[3]), (refs[4], None), ()))
    found = measure(plan, [step], 2)  # rank 0: 60 tokens computed, then none; rank 1: 40, then 50
    assert (found.num_steps, found.micro_batches_per_rank) == (1, 2)
    assert found.padding_share == pytest.approx(1 - 130 / 150)
    assert found.token_max_over_mean == pytest.approx(90 / 75)
    assert found.token_row_max_over_mean == pytest.approx((60 + 50) / 75)
    assert found.idle_share == pytest.approx(1 - 150 / (2 * 90))
    assert found.patch_max_over_mean == pytest.approx(9 / 6.5)
    assert found.samples_per_micro_batch == pytest.approx(5 / 3)
    assert (found.max_tokens, found.max_patches) == (60, 5)


@pytest.mark.parametrize("mix", MIXES)
def test_mixes_are_as_they_are_defined(mix):
    tokens, tiles = draw(mix, 100_000)
    again = draw(mix, 100_000)
    assert (tokens == again[0]).all() and (tiles == again[1]).all()
    assert tokens.mean() == pytest.approx({"images": 1135, "mix": 770, "heavy tail": 961}[mix], rel=0.02)
    assert (tiles == 0).mean() == pytest.approx({"images": 0, "mix": 0.5, "heavy tail": 0.49}[mix], abs=0.01)
    assert (tokens > 8192).mean() == pytest.approx(0.02 * 2 / 3 if mix == "heavy tail" else 0, abs=0.002)


@pytest.mark.parametrize("mix", MIXES)
def test_modes_keep_their_promises(mix):
    grouped = measure_batching(mix, "group_by_length", 8, 1, num_samples=32_768)
    assert grouped.padding_share < 0.08
    assert max(grouped.token_max_over_mean, grouped.patch_max_over_mean) < 1.1
    packed = measure_batching(mix, "packing", 8, 4, num_samples=16_384)
    assert packed.padding_share == 0
    assert max(packed.token_max_over_mean, packed.patch_max_over_mean) < 1.05
    assert packed.max_tokens <= 16_384
