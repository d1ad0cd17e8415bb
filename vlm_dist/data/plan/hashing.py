"""Hashes that are the same on every machine: numpy does not promise that its random streams stay across versions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def hash_words(*words: int) -> int:
    """Hash integers into 64 bits, in pure Python."""
    state = 0
    for word in words:
        state = (state ^ (word & _MASK)) + _GOLDEN & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def hash_rows(state: int, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Hash each row number together with a state (splitmix64): uint64 [len(rows)]."""
    values = (rows.astype(np.uint64) ^ np.uint64(state)) + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
