"""Packing: a step's samples into M x W packs, balanced over the ranks and, row by row, over the packs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.lengths import Costs
from vlm_dist.data.types import PackBudget

# Shapes: N samples of the step, W ranks, M packs per rank; 2 costs: tokens and patches

#: What the balance of a row of packs weighs beside that of the ranks. 0 gives ranks within 0.8% of each other but rows
#: of unequal packs (max/mean 1.12 row by row, pictures and texts, 64 ranks), 3 rows within 7% and ranks within 5%.
ROW_WEIGHT = 0.3

MAX_RANKS_PER_PART, MIN_RANKS_PER_PART = 64, 8

#: Each pack as numbers of the samples in it: [M][W].
Packs = list[list[list[int]]]


def pack_step(costs: Costs, budget: PackBudget, parts: Sequence[NDArray[np.int64]], ranks_per_part: int) -> Packs:
    """Cut a step into packs: as few for each rank as the budget allows, the same number for all ranks.

    A sample that alone is beyond the budget has a pack of its own. Packs are empty only where there are fewer samples
    than packs; samples with different batch keys never share one.

    Args:
        costs: of the step's samples.
        budget: of one pack.
        parts: numbers of the samples that each part of the ranks takes: one part for all ranks, or one per node.
        ranks_per_part: the ranks of the parts are numbered one part after the other.

    Returns:
        The packs of row m and rank r.
    """
    limits = np.array([budget.max_tokens, budget.max_patches or np.iinfo(np.int64).max], dtype=np.int64)
    parts, ranks_per_part = _split_parts(costs, parts, ranks_per_part)
    values = [np.stack([costs.tokens[part], costs.patches[part]], axis=1).astype(np.int64) for part in parts]
    keys = [costs.batch_key[part] for part in parts]
    num_rows = max(_least_rows(value, limits, ranks_per_part) for value in values)
    while True:
        placed = [_place(value, key, limits, num_rows, ranks_per_part) for value, key in zip(values, keys, strict=True)]
        if all(pack is not None for pack in placed):
            break
        num_rows += 1  # ends at the latest where every sample has a pack of its own
    packs: Packs = [[[] for _ in range(ranks_per_part * len(parts))] for _ in range(num_rows)]
    for number, (part, pack, value) in enumerate(zip(parts, placed, values, strict=True)):
        assert pack is not None
        for sample in np.lexsort((part, -value[:, 0])):  # a pack that is over its budget loses its shortest samples
            row, rank = divmod(int(pack[sample]), ranks_per_part)
            packs[row][number * ranks_per_part + rank].append(int(part[sample]))
    return packs


def _split_parts(
    costs: Costs, parts: Sequence[NDArray[np.int64]], ranks_per_part: int
) -> tuple[Sequence[NDArray[np.int64]], int]:
    """Cut parts of very many ranks into smaller ones that weigh the same: comparing 1024 ranks takes seconds a step."""
    if ranks_per_part <= MAX_RANKS_PER_PART:
        return parts, ranks_per_part
    fewer = max(d for d in range(1, MAX_RANKS_PER_PART + 1) if ranks_per_part % d == 0)
    if fewer < MIN_RANKS_PER_PART:  # so odd a number of ranks that it has no good divisor
        return parts, ranks_per_part
    num_pieces = ranks_per_part // fewer
    pieces: list[NDArray[np.int64]] = []
    for part in parts:
        values = np.stack([costs.tokens[part], costs.patches[part]], axis=1).astype(np.float64)
        weights = values / np.maximum(values.sum(axis=0), 1)
        order = np.lexsort((-weights.sum(axis=1), -weights.max(axis=1)))
        load = np.zeros((num_pieces, 2))
        piece = np.empty(len(part), dtype=np.int64)
        for start in range(0, len(order), num_pieces):  # round by round, the longest to the lightest
            some = order[start : start + num_pieces]
            lightest = np.argsort(load.max(axis=1), kind="stable")[: len(some)]
            piece[some] = lightest
            load[lightest] += weights[some]
        pieces += [part[piece == number] for number in range(num_pieces)]
    return pieces, fewer


def _least_rows(values: NDArray[np.int64], limits: NDArray[np.int64], num_ranks: int) -> int:
    """The fewest packs per rank that could do, if samples could be cut."""
    # a sample beyond the budget fills a pack, and no more
    filled = np.where((values > limits).any(axis=1, keepdims=True), 0, values).astype(np.float64).sum(axis=0) / limits
    num_alone = int((values > limits).any(axis=1).sum())
    return max(1, -(-(num_alone + int(np.ceil(filled.max() - 1e-9))) // num_ranks))


def _place(
    values: NDArray[np.int64], keys: NDArray[np.int64], limits: NDArray[np.int64], num_rows: int, num_ranks: int
) -> NDArray[np.int64] | None:
    """Put each sample into a pack, longest first into the lightest.

    A rank's packs are filled by a profile that all ranks share: where one long sample makes a pack long, the other
    ranks' packs of that row may be as long, and wait for nobody.

    Args:
        values: [N, 2] tokens and patches.
        keys: [N] batch keys.
        limits: [2] budget.
        num_rows: M.
        num_ranks: W.

    Returns:
        int64 [N]: row x W + rank; None where the samples do not fit.
    """
    totals = values.sum(axis=0).astype(np.float64)
    scale = np.divide(num_ranks, totals, out=np.zeros(2), where=totals > 0)  # a rank's mean load becomes 1
    weights = values * scale
    profile = np.stack([_profile(values[:, c], num_rows, num_ranks) for c in (0, 1)]) * scale[:, None]  # [2, M]
    # one array per cost: the loop's cost is that of numpy's calls
    load = [np.repeat((one[0] - one)[:, None], num_ranks, axis=1) for one in profile]  # [M, W] each
    rank_load = [np.zeros(num_ranks) for _ in range(2)]
    room = [np.full((num_rows, num_ranks), limit) for limit in limits]
    is_empty = np.ones((num_rows, num_ranks), dtype=bool)
    pack_key = np.zeros((num_rows, num_ranks), dtype=np.int64)
    waiting = set(keys.tolist())  # each key's first sample must still find an empty pack
    several_keys = len(waiting) > 1
    is_alone: list[bool] = np.any(values > limits, axis=1).tolist()
    packs = np.empty(len(values), dtype=np.int64)
    order = np.lexsort((-weights.sum(axis=1), -weights.max(axis=1))).tolist()
    for sample, (tokens, patches), (weight, vision) in zip(
        order, values[order].tolist(), weights[order].tolist(), strict=True
    ):
        fits: NDArray[np.bool_] = is_empty
        if not is_alone[sample]:
            fits = (room[0] >= tokens) & (room[1] >= patches)
        if several_keys:
            key = int(keys[sample])
            may_open = int(is_empty.sum()) > len(waiting - {key})
            fits = fits & np.where(is_empty, may_open, pack_key == key)
            waiting.discard(key)
        of_rank = np.maximum(rank_load[0] + weight, rank_load[1] + vision)
        heaviest = of_rank + ROW_WEIGHT * np.maximum(load[0] + weight, load[1] + vision)
        place = int(np.where(fits, heaviest, np.inf).argmin())
        row, rank = divmod(place, num_ranks)
        if not fits[row, rank]:
            return None
        packs[sample] = place
        for cost, (value, share) in enumerate(((tokens, weight), (patches, vision))):
            load[cost][row, rank] += share
            rank_load[cost][rank] += share
            room[cost][row, rank] -= value
        is_empty[row, rank] = False
        if several_keys:
            pack_key[row, rank] = key
    return _sort_rows(_fill_empty(packs, values, num_rows * num_ranks), weights, num_rows, num_ranks)


def _profile(values: NDArray[np.int64], num_rows: int, num_ranks: int) -> NDArray[np.float64]:
    """How much of one cost each row's packs should have: [M], longest first, a rank's mean load in all."""
    longest = -np.sort(-values)
    left = float(values.sum()) / num_ranks
    shares = np.zeros(num_rows)
    for row in range(num_rows):
        unavoidable = float(longest[row * num_ranks]) if row * num_ranks < len(longest) else 0.0
        shares[row] = max(left / (num_rows - row), min(unavoidable, left))
        left -= shares[row]
    return shares


def _fill_empty(packs: NDArray[np.int64], values: NDArray[np.int64], num_packs: int) -> NDArray[np.int64]:
    """Give every empty pack the shortest sample of the fullest pack, as long as one has several."""
    counts = np.bincount(packs, minlength=num_packs)
    tokens = np.bincount(packs, weights=values[:, 0], minlength=num_packs)
    for empty in np.flatnonzero(counts == 0).tolist():
        if counts.max(initial=0) < 2:
            break
        fullest = int(np.where(counts > 1, tokens, -1).argmax())
        members = np.flatnonzero(packs == fullest)
        moved = members[values[members, 0].argmin()]
        packs[moved] = empty
        counts[[fullest, empty]] += (-1, 1)
        tokens[[fullest, empty]] += (-values[moved, 0], values[moved, 0])
    return packs


def _sort_rows(
    packs: NDArray[np.int64], weights: NDArray[np.float64], num_rows: int, num_ranks: int
) -> NDArray[np.int64]:
    """Let each rank's heaviest pack come first: ranks wait for each other after every pack, under ZeRO-3 within it."""
    load = np.zeros((num_rows * num_ranks, 2))
    np.add.at(load, packs, weights)
    order = np.argsort(-load.max(axis=1).reshape(num_rows, num_ranks), axis=0, kind="stable")
    row_of = np.argsort(order, axis=0)
    row, rank = np.divmod(packs, num_ranks)
    return row_of[row, rank] * num_ranks + rank
