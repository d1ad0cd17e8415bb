"""Windows: how much of an epoch is put in order at once, and how a window becomes steps."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.lengths import Costs
from vlm_dist.data.plan.hashing import hash_rows, hash_words
from vlm_dist.data.plan.order import Samples

MAX_GROUPS = 64
MIN_WINDOW_STEPS = 64
MIN_WINDOW_SAMPLES = 4096

# Every step takes the same number of samples of each canonical group, so groups must agree on what is long. What they
# disagree by is chance, and costs max/mean: with 64 ranks of one micro-batch of 8 and 2% of videos it is 1.25 with 2048
# samples of a group in a window, 1.13 with 4096, 1.05 with 8192. So length grouping has larger windows, and fewer
# groups where the data are few; in a shuffled order groups need not agree.
GROUPED_SAMPLES_PER_GROUP = 8192
_MIN_GROUPED_WINDOWS = 2  # in an epoch, before it has more groups
#: A node has about so many devices, so a group with fewer samples per step serves no node.
MIN_GROUPED_SAMPLES_PER_STEP = 8
#: Grouped windows are cut by patches first, tokens second: into so many strata at most.
MAX_STRATA = 8

_STEPS = 4  # what a hash is for; order.py has the others


def num_groups(global_batch_size: int, num_epoch_samples: int | None = None) -> int:
    """Return C, the largest divisor of the global batch up to 64.

    Args:
        global_batch_size: samples per step.
        num_epoch_samples: where samples are grouped by length: each group needs enough of them. None: shuffled.
    """
    limit = min(MAX_GROUPS, global_batch_size)
    if num_epoch_samples is not None:
        enough = num_epoch_samples // (GROUPED_SAMPLES_PER_GROUP * _MIN_GROUPED_WINDOWS)
        limit = max(1, min(limit, global_batch_size // MIN_GROUPED_SAMPLES_PER_STEP, enough))
    return max(c for c in range(1, limit + 1) if global_batch_size % c == 0)


def num_windows(num_steps: int, global_batch_size: int, grouped_in: int | None = None) -> int:
    """Return in how many windows an epoch is cut: none has fewer than 64 steps unless the epoch has.

    Args:
        num_steps: of an epoch.
        global_batch_size: samples per step.
        grouped_in: number of canonical groups, where samples are grouped by length.
    """
    num_samples = MIN_WINDOW_SAMPLES if grouped_in is None else GROUPED_SAMPLES_PER_GROUP * grouped_in
    return max(1, num_steps // max(MIN_WINDOW_STEPS, -(-num_samples // global_batch_size)))


def merge_groups(group: NDArray[np.integer], rank_in_group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Merge groups fairly, each in its own order: the same rule as `shares`, for a window in memory.

    Args:
        group: [N] group of each sample.
        rank_in_group: [N] position of each sample within its group.

    Returns:
        int64 [N]: the samples in merged order.
    """
    sizes = np.bincount(group) if len(group) else np.zeros(1, dtype=np.int64)
    return np.lexsort((group, (2 * rank_in_group + 1) / (2 * sizes[group])))


def rank_within(group: NDArray[np.integer], *keys: NDArray[np.generic]) -> NDArray[np.int64]:
    """Rank samples within their group by the keys, the first key first; the sample's number decides ties."""
    order = np.lexsort((*reversed(keys), group))
    starts = np.concatenate([[0], np.cumsum(np.bincount(group))[:-1]]) if len(group) else np.zeros(1, dtype=np.int64)
    ranks = np.empty(len(group), dtype=np.int64)
    ranks[order] = np.arange(len(group)) - starts[group[order]]
    return ranks


def order_window(samples: Samples, batch_size: int, state: tuple[int, ...], costs: Costs | None) -> NDArray[np.int64]:
    """Put a window's samples in order: step i has those at positions i x batch_size to (i + 1) x batch_size.

    Every step takes its share of every group. With costs, a step takes the same quantile of every group, and the steps
    are permuted; within a step, the longest samples come first. The last step has what is left.

    Args:
        samples: of the window.
        batch_size: samples per step.
        state: what the permutation of the steps depends on: seed, epoch, window.
        costs: of the samples, to group them by length; None: shuffled.

    Returns:
        int64 [N]: numbers of the samples.
    """
    shuffled = merge_groups(samples.group, rank_within(samples.group, samples.key))
    if costs is None:
        step = np.arange(len(samples)) // batch_size
        return shuffled[np.lexsort((samples.row[shuffled], samples.source[shuffled], samples.key[shuffled], step))]
    # the tail is an unbiased sample of the window: were it cut off after sorting, it would be its longest samples
    num_full = len(samples) // batch_size
    full, tail = np.split(shuffled, [num_full * batch_size])
    merged = full[_group_by_length(samples, full, num_full, costs)]
    hashes = hash_rows(hash_words(*state, _STEPS), np.arange(num_full, dtype=np.int64))
    place = np.empty(num_full, dtype=np.int64)
    place[np.argsort(hashes, kind="stable")] = np.arange(num_full)
    step = np.concatenate([np.repeat(place, batch_size), np.full(len(tail), num_full)])
    merged = np.concatenate([merged, tail])
    tokens, patches = costs.tokens[merged], costs.patches[merged]
    return merged[np.lexsort((samples.row[merged], samples.key[merged], -patches, -tokens, step))]


def _group_by_length(samples: Samples, chosen: NDArray[np.int64], num_steps: int, costs: Costs) -> NDArray[np.int64]:
    """Order some samples so that neighbours cost alike: in strata of patches, within which the tokens decide.

    Tokens alone would put a text beside a picture of as many tokens: on equal terms for the language model, while one
    rank's vision tower works and the other's waits (max/mean of patches 1.17 instead of 1.03, of tokens 1.04 instead
    of 1.08, on pictures and texts with 64 ranks).
    """
    group, key = samples.group[chosen], samples.key[chosen]
    tokens, patches = costs.tokens[chosen], costs.patches[chosen]
    num_strata = min(MAX_STRATA, math.isqrt(num_steps))
    rank = rank_within(group, patches, tokens, key)
    if num_strata > 1:
        # strata begin with a step, so that no step has samples of two of them
        step = rank * num_steps // np.maximum(np.bincount(group), 1)[group]
        rank = rank_within(group, step * num_strata // num_steps, tokens, key)
    return merge_groups(group, rank)
