"""What the samples of a source are like, once they have been counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vlm_dist.data.lengths.token_store import LOST, Outcome, TokenStore
from vlm_dist.data.types import Source

_QUANTILES = {"median": 0.5, "90%": 0.9, "99%": 0.99, "longest": 1.0}


@dataclass(frozen=True)
class LengthSummary:
    """Figures of one source.

    Attributes:
        num_samples: all.
        num_tokens: of those that can be used.
        quantiles: tokens of a sample; empty where none can be used.
        num_reduced: samples whose media are made smaller.
        num_cut: samples whose text is cut.
        num_too_long: samples that do not fit in their smallest form.
        num_unusable: samples that are left out for another reason.
        num_lost: samples that timed out or ended their worker, so that their lengths are estimated.
    """

    num_samples: int
    num_tokens: int
    quantiles: Mapping[str, int]
    num_reduced: int
    num_cut: int
    num_too_long: int
    num_unusable: int
    num_lost: int


def summarise(source: Source, store: TokenStore) -> LengthSummary:
    """Sum up the counts of a source."""
    tokens, outcomes = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.int8)]
    for state in store.scan(source):
        tokens.append(state.counts.tokens[state.counted])
        outcomes.append(np.where(state.counts.tokens == LOST, Outcome.LOST, state.counts.outcomes)[state.counted])
    all_tokens, outcome = np.concatenate(tokens), np.concatenate(outcomes)
    usable = all_tokens[all_tokens > 0]
    quantiles = {"mean": round(float(usable.mean()))} if len(usable) else {}
    quantiles |= {name: int(np.quantile(usable, share)) for name, share in _QUANTILES.items() if len(usable)}
    number = {one: int((outcome == one).sum()) for one in Outcome}
    return LengthSummary(
        num_samples=len(all_tokens),
        num_tokens=int(usable.sum(dtype=np.int64)),
        quantiles=quantiles,
        num_reduced=number[Outcome.REDUCED],
        num_cut=number[Outcome.CUT],
        num_too_long=number[Outcome.TOO_LONG],
        num_unusable=number[Outcome.UNUSABLE],
        num_lost=number[Outcome.LOST],
    )
