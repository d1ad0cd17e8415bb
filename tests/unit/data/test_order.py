"""The order: fair merges, permutations that cover, and the same numbers on every machine."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_dist.data.plan.hashing import hash_rows, hash_words
from vlm_dist.data.plan.order import EpochOrder, PassOrder, SourceShape, shares
from vlm_dist.data.plan.windows import merge_groups, num_groups, num_windows, rank_within


def test_the_hash_is_the_same_everywhere():
    """Golden values: if they change, no running job can be resumed; raise ORDER_VERSION and say so."""
    assert [hash_words(42), hash_words(42, 7), hash_words(-1)] == [
        0xBDD732262FEB6E95,
        0x16062D6C1339E500,
        0xE4D971771B652C20,
    ]
    rows = np.array([0, 1, 2**40], dtype=np.int64)
    assert hash_rows(hash_words(), rows).tolist() == [hash_words(0), hash_words(1), hash_words(2**40)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_a_merge_is_fair_and_only_grows(sizes):
    before = [0] * len(sizes)
    for total in range(sum(sizes) + 1):
        counts = shares(sizes, total)
        assert sum(counts) == total
        assert all(0 <= old <= new <= size for old, new, size in zip(before, counts, sizes, strict=True))
        ideal = [size * total / max(sum(sizes), 1) for size in sizes]
        assert max(abs(a - b) for a, b in zip(counts, ideal, strict=True)) <= len(sizes) / 2 + 1
        before = counts
    assert before == sizes


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_merging_in_memory_is_the_same_merge(sizes):
    group = np.repeat(np.arange(len(sizes)), sizes)
    rank = np.concatenate([np.arange(size) for size in sizes]).astype(np.int64)
    merged = group[merge_groups(group, rank)]
    for total in range(len(group) + 1):
        assert np.bincount(merged[:total], minlength=len(sizes)).tolist() == shares(sizes, total)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=30))
def test_ranks_within_groups(pairs):
    group = np.array([g for g, _ in pairs], dtype=np.int64)
    key = np.array([k for _, k in pairs], dtype=np.int64)
    ranks = rank_within(group, key)
    for g in range(4):
        mine = [(k, i) for i, (other, k) in enumerate(pairs) if other == g]
        assert [int(ranks[i]) for _, i in sorted(mine)] == list(range(len(mine)))


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 5), st.booleans())
def test_a_pass_covers_its_source_once(sizes, number, shuffle):
    order = PassOrder(tuple(sizes), 3, 0, number, shuffle)
    rows = order.rows(0, sum(sizes)).tolist()
    assert sorted(rows) == list(range(sum(sizes)))
    if not shuffle:
        assert rows == sorted(rows)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.floats(0.1, 3.2)), min_size=1, max_size=3
    ),
    st.integers(1, 8),
    st.integers(1, 60),
    st.booleans(),
)
def test_windows_of_any_size_cover_an_epoch(sources, groups, window, shuffle):
    shapes = [SourceShape(tuple(s), int(r * sum(s))) for s, r in sources]
    order = EpochOrder(shapes, 1, 2, groups, shuffle)
    assert order.num_samples == sum(shape.num_epoch_samples for shape in shapes)
    seen = []
    for start in range(0, order.num_samples, window):
        samples = order.window(start, min(start + window, order.num_samples))
        assert len(samples) == min(window, order.num_samples - start)
        seen += list(zip(samples.source.tolist(), samples.row.tolist(), samples.repeat.tolist(), strict=True))
    assert len(set(seen)) == len(seen) == order.num_samples


@settings(deadline=None)
@given(st.integers(1, 2000))
def test_groups_divide_the_global_batch(batch):
    groups = num_groups(batch)
    assert batch % groups == 0
    assert groups <= 64
    assert all(batch % more for more in range(groups + 1, 65) if more <= batch)


@pytest.mark.parametrize(("steps", "batch"), [(1, 8), (63, 512), (64, 512), (1000, 512), (100_000, 1)])
def test_windows_have_at_least_64_steps(steps, batch):
    assert num_windows(steps, batch) == 1 or steps // num_windows(steps, batch) >= 64
