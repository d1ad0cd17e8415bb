"""The order in which records become samples: that of the source, or a shuffled one that is a function of a seed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.plan.hashing import hash_rows, hash_words

_BUILD = 0x6275696C64  # keeps these numbers apart from those of the training order
_T = TypeVar("_T")


def record_order(num_records: int, seed: int | None, limit: int | None) -> NDArray[np.int64]:
    """List the numbers of the records in the order in which they are written.

    Args:
        num_records: of the source.
        seed: of the permutation; None keeps the source's order.
        limit: only so many, the first of the order.
    """
    order = np.arange(num_records, dtype=np.int64)
    if seed is not None:
        order = np.argsort(hash_rows(hash_words(seed, _BUILD), order), kind="stable")
    return order if limit is None else order[:limit]


def shuffle_stream(items: Iterable[_T], seed: int, buffer_size: int) -> Iterator[_T]:
    """Shuffle what cannot be read by number: each item changes places with one of the `buffer_size` before it."""
    draw = random.Random(seed)  # noqa: S311 - an order, no secret
    waiting: list[_T] = []
    for item in items:
        if len(waiting) < buffer_size:
            waiting.append(item)
            continue
        place = draw.randrange(buffer_size)
        yield waiting[place]
        waiting[place] = item
    while waiting:
        place = draw.randrange(len(waiting))
        waiting[place], waiting[-1] = waiting[-1], waiting[place]
        yield waiting.pop()
