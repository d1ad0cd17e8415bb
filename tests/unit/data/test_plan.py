"""The plan: every sample once per epoch, for any number of ranks and any restart; the same on every machine."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_dist.data.index.facts import FACTS_DTYPE
from vlm_dist.data.lengths.estimate import BYTES_PER_TOKEN
from vlm_dist.data.plan.plan import Plan, PlanSettings
from vlm_dist.errors import CheckpointError, DataError


class FakeSource:
    """Sizes and lengths without data."""

    def __init__(self, sizes, name="a", manifest_hash=None):
        self.name = name
        self.shard_sizes = list(sizes)
        self.manifest_hash = manifest_hash or f"{name}{sizes}"

    def __len__(self):
        return sum(self.shard_sizes)

    def facts(self, rows):
        facts = np.zeros(len(rows), dtype=FACTS_DTYPE)
        facts["text_bytes"] = np.ceil(lengths_of(rows) * BYTES_PER_TOKEN)
        return facts


def lengths_of(rows):
    return (np.asarray(rows) * 7919) % 1009 + 1


def make_plan(sizes=(50, 30, 20), repeats=(1.0,), **changes):
    sources = [FakeSource(s, f"s{i}") for i, s in enumerate(sizes if isinstance(sizes[0], list) else [list(sizes)])]
    return Plan(sources, repeats, PlanSettings(**{"global_batch_size": 8, "micro_batch_size": 2, **changes}))


def refs_of(step):
    return [ref for micro_batch in step.micro_batches for ref in micro_batch if ref is not None]


plans = st.builds(
    lambda sources, batch, micro, mode, seed, shuffle: Plan(
        [FakeSource(sizes, f"s{i}") for i, (sizes, _) in enumerate(sources)],
        [repeat for _, repeat in sources],
        PlanSettings(batch, micro, mode, seed, num_epochs=2.0, shuffle=shuffle),
    ),
    st.lists(
        st.tuples(st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(sum), st.floats(1.0, 2.7)),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 24),
    st.integers(1, 9),
    st.sampled_from(["padding", "group_by_length"]),
    st.integers(0, 2**63),
    st.booleans(),
)


@settings(deadline=None)
@given(plans, st.sampled_from([1, 2, 8]), st.data())
def test_every_sample_once_per_epoch_on_any_ranks_and_after_any_restart(plan, world_size, data):
    size = plan.settings.global_batch_size
    restart = data.draw(st.integers(0, plan.steps_per_epoch - 1))
    for epoch in range(2):
        seen = Counter()
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            if step == restart:
                plan = Plan(plan._sources, plan._repeats, plan.settings)
            planned = plan.step(step)
            assert sum(len(m) for m in planned.micro_batches) == size
            assert len(planned.micro_batches) == -(-size // plan.settings.micro_batch_size)
            by_rank = [planned.for_rank(rank, world_size) for rank in range(world_size)]
            assert len({len(jobs) for jobs in by_rank}) == 1
            dealt = [ref for jobs in by_rank for job in jobs for ref in job.refs if ref is not None]
            assert Counter(dealt) == Counter(refs_of(planned))
            is_last = (step + 1) % plan.steps_per_epoch == 0
            assert len(dealt) == (size if not is_last else (plan.num_epoch_samples - 1) % size + 1)
            seen.update(dealt)
        assert set(seen.values()) == {1}
        assert sum(seen.values()) == plan.num_epoch_samples
        for number, source in enumerate(plan._sources):
            rows = Counter(ref.index for ref in seen if ref.source == number)
            assert sum(rows.values()) == int(plan._repeats[number] * len(source) + 1e-9)
            assert set(rows) <= set(range(len(source)))


def test_an_epoch_holds_whole_passes_and_a_rest():
    plan = make_plan(sizes=[[40], [10]], repeats=[1.0, 2.5], num_epochs=2.0)
    for epoch, expected in ((0, {2, 3}), (1, {2, 3})):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        refs = [ref for i in steps for ref in refs_of(plan.step(i))]
        assert set(Counter(ref.index for ref in refs if ref.source == 1).values()) == expected
    refs = [ref for step in plan.steps() for ref in refs_of(step) if ref.source == 1]
    assert set(Counter(ref.index for ref in refs).values()) == {5}  # two epochs of 2.5 passes


def test_half_a_source_per_epoch_is_another_half_in_the_next():
    plan = make_plan(sizes=[[300]], repeats=[0.5], num_epochs=2.0)
    seen = Counter(ref.index for step in plan.steps() for ref in refs_of(step))
    assert seen == Counter(range(300))


def test_steps_are_independent_of_micro_batch_size_and_order_of_asking():
    one, other = make_plan(micro_batch_size=2), make_plan(micro_batch_size=8)
    backwards = [one.step(i) for i in reversed(range(one.num_steps))][::-1]
    assert [refs_of(step) for step in backwards] == [refs_of(step) for step in other.steps()]
    assert one.digest == other.digest


def test_epochs_differ_and_seeds_differ():
    plan = make_plan(num_epochs=2.0)
    first = [refs_of(plan.step(i)) for i in range(plan.steps_per_epoch)]
    second = [refs_of(plan.step(i)) for i in range(plan.steps_per_epoch, plan.num_steps)]
    other_seed = [refs_of(step) for step in make_plan(seed=1).steps()]
    assert first != second
    assert first != other_seed


def test_sources_are_mixed_in_every_step():
    plan = make_plan(sizes=[[3000], [1000]], repeats=[1.0, 1.0], global_batch_size=64, micro_batch_size=8)
    shares = [sum(ref.source == 0 for ref in refs_of(step)) / 64 for step in list(plan.steps())[:-1]]
    assert min(shares) > 0.4
    assert abs(np.mean(shares) - 0.75) < 0.02


def test_grouping_by_length_saves_padding_and_aligns_ranks():
    def cost(mode):
        plan = make_plan(sizes=(2000, 2000), mode=mode, global_batch_size=64, micro_batch_size=4)
        pads = total = 0
        slowest = fastest = 0
        for step in plan.steps():
            longest = []
            for job in (job for rank in range(8) for job in step.for_rank(rank, 8)):
                lengths = lengths_of([ref.index for ref in job.refs if ref is not None])
                if len(lengths):
                    pads += max(lengths) * len(lengths) - sum(lengths)
                    total += max(lengths) * len(lengths)
                longest.append(max(lengths, default=0))
            slowest += max(longest[::2]) + max(longest[1::2])
            fastest += min(longest[::2]) + min(longest[1::2])
        return pads / total, fastest / slowest

    grouped, shuffled = cost("group_by_length"), cost("padding")
    assert grouped[0] < 0.05 < 0.3 < shuffled[0]
    assert grouped[1] > 0.9


def test_grouped_steps_come_in_no_order_of_length():
    plan = make_plan(sizes=(4000,), mode="group_by_length", global_batch_size=16, micro_batch_size=4)
    means = [np.mean(lengths_of([r.index for r in refs_of(step)])) for step in plan.steps()]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


def test_evaluation_keeps_the_order_and_ends_in_null_slots():
    plan = make_plan(sizes=(5, 6), shuffle=False)
    first, last = plan.steps()
    assert [ref.index for ref in refs_of(first)] == list(range(8))
    assert last.micro_batches[1][1] is None
    assert last.micro_batches[2:] == ((None, None), (None, None))


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"num_epochs": 1.0}, 13),
        ({"num_epochs": 0.5}, 7),
        ({"num_epochs": 2.1}, 28),
        ({"num_epochs": 0.001}, 1),
        ({"max_steps": 40}, 40),
        ({"max_steps": 3}, 3),
        ({"max_steps": -1}, 13),
    ],
)
def test_length_of_a_run(changes, steps):
    plan = make_plan(**changes)
    assert plan.steps_per_epoch == 13
    assert plan.num_steps == steps
    assert len(list(plan.steps())) == steps
    with pytest.raises(IndexError):
        plan.step(steps)


def test_epochs_are_counted_by_steps():
    plan = make_plan(num_epochs=2.0)
    assert plan.step(12).epoch == 1.0
    assert plan.step(25).epoch == 2.0


def test_a_state_is_small_and_accepted_by_a_longer_run_on_other_ranks():
    sources = [FakeSource([10] * 1000, f"a-long-source-name-{i}") for i in range(50)]
    settings_ = PlanSettings(64, 2, "group_by_length")
    plan = Plan(sources, [1.0] * 50, settings_)
    state = json.loads(json.dumps(plan.state(1234)))
    assert len(json.dumps(state)) < 1024
    assert (state["step"], state["epoch"], state["step_in_epoch"]) == (1234, 0, 1234)
    Plan(sources, [1.0] * 50, PlanSettings(64, 8, "group_by_length", num_epochs=3.0)).check_state(state)


def test_a_state_of_another_run_is_refused_with_all_differences():
    state = make_plan().state(5)
    with pytest.raises(CheckpointError) as refused:
        make_plan(sizes=(50, 30, 21), seed=7, global_batch_size=16).check_state(state)
    message = str(refused.value)
    assert "global_batch_size: checkpoint 8, now 16" in message
    assert "seed: checkpoint 42, now 7" in message
    assert "s0" in message
    assert "samples 100 -> 101" in message


def test_a_state_with_many_sources_is_refused_too():
    plan = Plan([FakeSource([10], f"a-long-source-name-{i}") for i in range(50)], [1.0] * 50, PlanSettings(8, 2))
    other = Plan([FakeSource([10], f"a-long-source-name-{i}") for i in range(49)], [1.0] * 49, PlanSettings(8, 2))
    with pytest.raises(CheckpointError, match="sources"):
        other.check_state(plan.state(0))


def test_another_process_plans_the_same():
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; from test_plan import make_plan, refs_of; "
        "steps = make_plan(mode='group_by_length').steps(); "
        "print([[(r.source, r.index, r.repeat) for r in refs_of(step)] for step in steps])"
    )
    paths = [path for path in sys.path if path] + [str(__file__).rsplit("/", 1)[0]]
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code, *paths],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    own = [[(r.source, r.index, r.repeat) for r in refs_of(s)] for s in make_plan(mode="group_by_length").steps()]
    assert outputs == [f"{own}\n"] * 2


def test_a_billion_samples_are_planned_by_window():
    source = FakeSource([10_000] * 100_000)
    plan = Plan([source], [1.0], PlanSettings(1024, 8, "group_by_length"))
    refs = refs_of(plan.step(500_000))
    assert len({ref.index for ref in refs}) == 1024
    assert not {ref.index for ref in refs} & {ref.index for ref in refs_of(plan.step(500_001))}


@pytest.mark.parametrize(
    ("sizes", "repeats", "changes", "message"),
    [
        ((0, 0), [1.0], {}, "no samples"),
        ((3,), [0.1], {}, "no samples"),
        ((3,), [0.0], {}, "repeat must be above 0"),
        ((3,), [float("nan")], {}, "repeat must be above 0"),
        ((3,), [1.0], {"num_epochs": 0.0}, "num_epochs"),
        ((3,), [1.0], {"mode": "packing"}, "budget"),
        ((3,), [1.0], {"mode": "sorted"}, "padding, group_by_length or packing"),
        ((3,), [1.0], {"global_batch_size": 0}, "positive"),
    ],
)
def test_impossible_plans_are_refused(sizes, repeats, changes, message):
    with pytest.raises(DataError, match=message):
        make_plan(sizes=sizes, repeats=repeats, **changes)
