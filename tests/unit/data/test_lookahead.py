"""Steps are planned once each, a little ahead, and the sources hear of them in their order."""

import numpy as np

from tests.unit.data.samples import MemorySource
from vlm_dist.data.lookahead import Lookahead
from vlm_dist.data.plan.plan import Plan, PlanSettings


class Listener(MemorySource):
    def __init__(self, num_rows):
        super().__init__([{}] * num_rows)
        self.heard = []

    def will_read(self, rows):
        self.heard.append(rows.tolist())


class CountingPlan:
    def __init__(self, plan):
        self.plan, self.num_steps, self.asked = plan, plan.num_steps, []

    def step(self, index):
        self.asked.append(index)
        return self.plan.step(index)


def test_steps_come_in_order_and_are_announced_ahead():
    source = Listener(40)
    plan = CountingPlan(Plan([source], [1.0], PlanSettings(4, 2, shuffle=False)))
    ahead = Lookahead(plan, [source], rank=1, world_size=2, num_steps=3)
    for index in range(2, plan.num_steps):
        assert ahead.take(index).step == index
        ahead.look_ahead(index)
        known = min(index + 3, 2 + 2 * (index - 1), plan.num_steps - 1)  # two more with each step, at most three ahead
        assert len(source.heard) == known - 1
    assert plan.asked == list(range(2, 10))
    whole = [plan.plan.step(index).for_rank(1, 2) for index in range(2, 10)]
    assert source.heard == [[ref.index for job in jobs for ref in job.refs if ref] for jobs in whole]


def test_another_position_is_planned_anew():
    source = Listener(40)
    ahead = Lookahead(Plan([source], [1.0], PlanSettings(4, 2, shuffle=False)), [source], 0, 1, 2)
    ahead.take(0)
    ahead.look_ahead(0)
    assert ahead.take(7).step == 7
    assert np.array(source.heard[-1]).tolist() == [28, 29, 30, 31]
