"""How a step is cut: the same samples in every mode and layout, packs within budgets, keys and nodes apart."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.plan_sources import FakeLengths, FakeSource, costs_of, refs_of
from vlm_dist.data.lengths import Costs
from vlm_dist.data.plan.mix import repeats_of_weights
from vlm_dist.data.plan.packing import pack_step
from vlm_dist.data.plan.plan import Plan, PlanSettings
from vlm_dist.data.types import Layout, PackBudget, StepPlan

budgets = st.builds(PackBudget, st.integers(200, 4000), st.none() | st.integers(50, 1000))
layouts = st.builds(
    lambda nodes, ranks: Layout(nodes * ranks, ranks), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 3, 8])
)


@st.composite
def cut_plans(draw):
    """A plan of any mode, and the same on any other ranks."""
    sizes = draw(st.lists(st.lists(st.integers(0, 70), min_size=1, max_size=5).filter(sum), min_size=1, max_size=3))
    sources = [FakeSource(one, f"s{i}") for i, one in enumerate(sizes)]
    if draw(st.booleans()):
        repeats = repeats_of_weights(
            draw(st.lists(st.floats(0.5, 5), min_size=len(sizes), max_size=len(sizes))), [len(s) for s in sources]
        )
    else:
        repeats = [draw(st.floats(0.5, 2.5)) for _ in sizes]
    settings_ = PlanSettings(
        draw(st.integers(1, 48)),
        draw(st.integers(1, 9)),
        draw(st.sampled_from(["padding", "group_by_length", "packing"])),
        draw(st.integers(0, 2**63)),
        pack=draw(budgets),
        balance_scope=draw(st.sampled_from(["world", "node"])),
    )
    if sum(math.floor(r * len(s) + 1e-9) for r, s in zip(repeats, sources, strict=True)) == 0:
        repeats = [1.0] * len(sources)
    lengths = FakeLengths(draw(st.sampled_from([1, 1, 2, 5])))
    return Plan(sources, repeats, settings_, lengths, draw(layouts)), draw(layouts)


@settings(deadline=None, max_examples=60)
@given(cut_plans(), st.data())
def test_any_cut_gives_every_rank_as_many_micro_batches_and_loses_nothing(drawn, data):
    plan, other_layout = drawn
    other = Plan(plan._sources, plan._repeats, plan.settings, plan._lengths, other_layout)
    assert plan.digest == other.digest
    assert plan.state(0) == other.state(0)
    seen = Counter()
    steps = range(plan.num_steps)
    for index in data.draw(st.permutations(steps)) if len(steps) < 20 else steps:
        step, world_size = plan.step(index), plan.layout.world_size
        by_rank = [step.for_rank(rank, world_size) for rank in range(world_size)]
        assert len({len(jobs) for jobs in by_rank}) == 1
        assert len({job.micro_batch for jobs in by_rank for job in jobs}) == world_size * len(by_rank[0])
        dealt = [ref for jobs in by_rank for job in jobs for ref in job.refs if ref is not None]
        assert Counter(dealt) == Counter(refs_of(other.step(index)))
        seen.update(dealt)
        for jobs in by_rank:
            for job in jobs:
                refs = [ref for ref in job.refs if ref is not None]
                assert len(set(costs_of(plan, refs)[:, 2].tolist())) <= 1
                assert plan.settings.mode == "packing" or len(job.refs) <= plan.settings.micro_batch_size
    assert set(seen.values()) == {1}
    assert sum(seen.values()) == plan.num_epoch_samples
    for number, source in enumerate(plan._sources):
        times = Counter(ref.index for ref in seen if ref.source == number)
        wanted = math.floor(plan._repeats[number] * len(source) + 1e-9)
        assert sum(times.values()) == wanted
        assert not times or max(times.values()) - wanted // len(source) <= 1


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 90),
    budgets,
    st.integers(1, 3),
    st.sampled_from([(1, 1), (1, 2), (1, 8), (2, 2), (2, 8)]),
    st.integers(0, 1000),
)
def test_packs_respect_their_budget_and_are_few(num_samples, budget, num_keys, parts_and_ranks, seed):
    parts, ranks = parts_and_ranks
    costs = FakeLengths(num_keys, 3000, seed).costs(0, np.arange(num_samples))
    shares = [np.arange(part, num_samples, parts) for part in range(parts)]
    packs = pack_step(costs, budget, shares, ranks)
    assert {len(row) for row in packs} == {parts * ranks}
    assert sorted(sample for row in packs for pack in row for sample in pack) == list(range(num_samples))
    for part, share in enumerate(shares):
        mine = [pack for row in packs for pack in row[part * ranks : (part + 1) * ranks]]
        assert {sample for pack in mine for sample in pack} == set(share.tolist())
        assert sum(not pack for pack in mine) == max(0, len(mine) - len(share))  # empty only for want of samples
    for pack in (pack for row in packs for pack in row if pack):
        assert len(set(costs.batch_key[pack].tolist())) == 1
        assert costs.tokens[pack].tolist() == sorted(costs.tokens[pack].tolist(), reverse=True)
        patches = costs.patches[pack].sum()
        fits = costs.tokens[pack].sum() <= budget.max_tokens and patches <= (budget.max_patches or patches)
        assert fits or len(pack) == 1
    if num_keys == 1:  # first-fit decreasing needs at most 1.7 times the least, two budgets twice as many and one
        filled = max(
            max(
                costs.tokens[share].clip(max=budget.max_tokens).sum() / budget.max_tokens
                + (
                    costs.patches[share].clip(max=budget.max_patches).sum() / budget.max_patches
                    if budget.max_patches
                    else 0
                ),
                0,
            )
            for share in shares
        )
        assert len(packs) <= math.ceil(2 * filled / ranks) + 1


def test_a_sample_beyond_the_budget_has_a_pack_of_its_own():
    costs = Costs(np.array([5000, 100, 100, 100]), np.zeros(4, dtype=np.int64), np.zeros(4, dtype=np.int64))
    (row,) = pack_step(costs, PackBudget(1000), [np.arange(4)], 2)
    assert sorted(map(sorted, row)) == [[0], [1, 2, 3]]


def test_one_row_is_enough_where_one_is_enough():
    costs = FakeLengths(1, 500).costs(0, np.arange(64))
    assert len(pack_step(costs, PackBudget(int(costs.tokens.sum() / 8 * 1.05)), [np.arange(64)], 8)) == 1
    assert len(pack_step(costs, PackBudget(int(costs.tokens.sum() / 16 * 1.05)), [np.arange(64)], 8)) == 2


def test_packs_balance_ranks_and_rows_on_both_costs():
    """Pictures and texts: neither cost follows from the other."""
    rng = np.random.default_rng(0)
    is_picture = rng.random(8 * 32) < 0.5
    patches = np.where(is_picture, rng.choice([1, 3, 5], len(is_picture)) * 256, 0)
    texts = np.clip(rng.lognormal(5.6, 0.9, len(is_picture)), 32, 8192).astype(np.int64)
    costs = Costs(texts + patches, patches * 4, np.zeros_like(patches))
    packs = pack_step(costs, PackBudget(16_384), [np.arange(len(patches))], 8)
    load = np.array([[[costs.tokens[p].sum(), costs.patches[p].sum()] for p in row] for row in packs])
    ranks, rows = load.sum(axis=0), load.max(axis=1).sum(axis=0)
    assert (ranks.max(axis=0) / ranks.mean(axis=0) < 1.03).all()
    assert (rows / ranks.mean(axis=0) < 1.06).all()


def test_many_ranks_are_balanced_in_parts():
    costs = FakeLengths(1, 4000).costs(0, np.arange(256 * 16))
    packs = pack_step(costs, PackBudget(16_000), [np.arange(256 * 16)], 256)
    load = np.array([sum(costs.tokens[pack].sum() for pack in ranks) for ranks in zip(*packs, strict=True)])
    assert len(load) == 256
    assert load.max() / load.mean() < 1.03
    few = pack_step(costs, PackBudget(16_000), [np.arange(300)], 256)
    assert [min(map(len, row)) for row in few] == [1]


def test_modes_that_do_not_group_have_the_same_steps_and_state():
    sources = [FakeSource([100, 60])]

    def plan(mode, **changes):
        return Plan(sources, [1.0], PlanSettings(16, 2, mode, pack=PackBudget(2000), **changes), FakeLengths())

    padded, packed, grouped = plan("padding"), plan("packing"), plan("group_by_length")
    for one, other in zip(padded.steps(), packed.steps(), strict=True):
        assert set(refs_of(one)) == set(refs_of(other))
    assert padded.digest == packed.digest != grouped.digest
    assert padded.cut_digest != packed.cut_digest
    packed.check_state(padded.state(3))
    assert padded.state(3)["lengths"] is None
    assert packed.state(3)["lengths"] == FakeLengths().digest


@pytest.mark.parametrize("mode", ["padding", "group_by_length", "packing"])
def test_with_node_scope_ranks_get_their_nodes_samples(mode):
    """One shard per group: which shards a node reads is what staging is about."""
    source = FakeSource([4096] * 64)
    node, world = (
        Plan(
            [source],
            [1.0],
            PlanSettings(128, 2, mode, pack=PackBudget(8000), balance_scope=scope),
            FakeLengths(),
            Layout(16, 8),
        )
        for scope in ("node", "world")
    )
    assert node.notices == ()
    read = [set(), set()]
    for index in range(20):
        assert Counter(refs_of(node.step(index))) == Counter(refs_of(world.step(index)))
        for rank in range(16):
            read[rank // 8] |= {
                ref.index // 4096 for job in node.step(index).for_rank(rank, 16) for ref in job.refs if ref is not None
            }
    assert not read[0] & read[1]


def test_what_a_node_has_too_many_is_moved_and_no_more():
    """Groups are as equal as whole numbers allow: with sources of odd sizes a step has one more of a group at times."""
    sources = [FakeSource([97, 101, 103], "a"), FakeSource([59], "b")]
    plan = Plan(sources, [1.0, 1.7], PlanSettings(32, 2, balance_scope="node"), FakeLengths(), Layout(8, 2))
    for step in plan.steps():
        by_rank = [step.for_rank(rank, 8) for rank in range(8)]
        assert {len(jobs) for jobs in by_rank} == {2}
        assert all(len(job.refs) == 2 for jobs in by_rank for job in jobs)


@pytest.mark.parametrize(
    ("layout", "why"),
    [
        (Layout(6, 2), "3 nodes do not divide the run's 64 groups"),
        (Layout(8, 3), "8 ranks are no multiple of 3 ranks per node"),
        (Layout(8, 0), "not all nodes have equally many ranks"),
    ],
)
def test_node_scope_that_cannot_be_says_so(layout, why):
    settings_ = PlanSettings(64, 2, balance_scope="node")
    plan = Plan([FakeSource([640])], [1.0], settings_, FakeLengths(), layout)
    assert why in plan.notices[0]
    world = Plan([FakeSource([640])], [1.0], PlanSettings(64, 2), FakeLengths())
    assert [step.micro_batches for step in plan.steps()] == [step.micro_batches for step in world.steps()]


def test_a_step_that_is_cut_for_some_ranks_is_not_dealt_to_others():
    plan = Plan(
        [FakeSource([40])], [1.0], PlanSettings(8, 1, "packing", pack=PackBudget(900)), FakeLengths(), Layout(2)
    )
    with pytest.raises(ValueError, match="cut for 2 ranks, not for 4"):
        plan.step(0).for_rank(0, 4)


def test_every_other_row_is_dealt_backwards():
    step = StepPlan(0, 1.0, tuple(() for _ in range(6)))
    assert [[job.micro_batch for job in step.for_rank(rank, 2)] for rank in range(2)] == [[0, 3, 4], [1, 2, 5]]


def test_weights_share_an_epoch_out():
    assert repeats_of_weights([1, 1], [100, 300]) == [2.0, 2 / 3]
    assert repeats_of_weights([3, 3], [10, 10]) == [1.0, 1.0]
    plan = Plan(
        [FakeSource([300], "a"), FakeSource([100], "b")], repeats_of_weights([1, 3], [300, 100]), PlanSettings(40, 2)
    )
    shares = [sum(ref.source == 1 for ref in refs_of(step)) / 40 for step in plan.steps()]
    assert plan.num_epoch_samples == 400
    assert np.mean(shares) == pytest.approx(0.75)
    assert max(shares) - min(shares) < 0.2
