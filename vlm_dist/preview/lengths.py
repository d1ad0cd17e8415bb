"""How long the samples of a run are, as the planner knows it; of huge data an even share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm_dist.build.lengths import make_stores
from vlm_dist.data.lengths.summary import summarise
from vlm_dist.data.lengths.token_store import TokenStore
from vlm_dist.data.types import Source
from vlm_dist.preview.opening import OpenRun

#: Samples of one source that are looked at, and shards that they come from: an index may lie on another machine.
MAX_SAMPLES = 200_000
MAX_SHARDS = 128
#: Of larger sources nobody asks what became of each sample: it is in as many files as there are shards.
MAX_SUMMED = 2_000_000


@dataclass(frozen=True)
class SourceLengths:
    """Predicted costs of one source's samples.

    Attributes:
        name: of the source.
        num_samples: of the source.
        repeat: passes over it in an epoch.
        tokens: int64 [N], of those that were looked at.
        patches: int64 [N], of the vision tower.
        num_at_limit: of them, as long as `max_length`.
        outcomes: what becomes of all of its samples, in words, where they were counted; None: not known.
    """

    name: str
    num_samples: int
    repeat: float
    tokens: NDArray[np.int64]
    patches: NDArray[np.int64]
    num_at_limit: int
    outcomes: Mapping[str, int] | None = None

    @property
    def is_sampled(self) -> bool:
        """Whether not all were looked at."""
        return len(self.tokens) < self.num_samples

    def tokens_at(self, share: float) -> int:
        """Quantile of the tokens; 0 of no samples."""
        return _quantile(self.tokens, share)

    def patches_at(self, share: float) -> int:
        """Quantile of the patches of samples that show something; 0 where none does."""
        return _quantile(self.patches[self.patches > 0], share)


@dataclass(frozen=True)
class Lengths:
    """Of all training sources.

    Attributes:
        sources: in the order of the run.
        are_exact: they were counted; else they are estimated.
        max_length: in tokens.
    """

    sources: Sequence[SourceLengths]
    are_exact: bool
    max_length: int

    @property
    def kind(self) -> str:
        """In words."""
        return "counted" if self.are_exact else "estimated"

    @property
    def is_sampled(self) -> bool:
        """Whether not all samples were looked at."""
        return any(source.is_sampled for source in self.sources)

    @property
    def outcomes(self) -> Mapping[str, int] | None:
        """What becomes of all samples, where all were counted."""
        known = [source.outcomes for source in self.sources if source.outcomes is not None]
        if len(known) < len(self.sources):
            return None
        return {name: sum(one[name] for one in known) for name in known[0]}

    @property
    def num_seen(self) -> int:
        """Samples that were looked at."""
        return sum(len(source.tokens) for source in self.sources)

    @property
    def num_samples(self) -> int:
        """Samples of the data."""
        return sum(source.num_samples for source in self.sources)


def measure_lengths(run: OpenRun, repeats: Sequence[float]) -> Lengths:
    """Predict the lengths of all samples, or of an even share.

    Args:
        run: that has them.
        repeats: passes over each source in an epoch.

    Raises:
        DataError: an index cannot be read.
    """
    limit = run.config.collator.text_processing.max_length
    stores = make_stores(run.config, run.processor, run.family)
    found = []
    for number, (source, repeat) in enumerate(zip(run.train_sources, repeats, strict=True)):
        costs = run.lengths.costs(number, even_rows(source))
        at_limit = int((costs.tokens >= limit).sum())
        told = _outcomes(source, stores[number]) if run.are_exact and len(source) <= MAX_SUMMED else None
        found.append(SourceLengths(source.name, len(source), repeat, costs.tokens, costs.patches, at_limit, told))
    return Lengths(found, run.are_exact, limit)


def _outcomes(source: Source, store: TokenStore) -> Mapping[str, int]:
    summary = summarise(source, store)
    return {
        "made smaller": summary.num_reduced,
        "cut": summary.num_cut,
        "too long": summary.num_too_long,
        "unusable": summary.num_unusable + summary.num_lost,
    }


def _quantile(values: NDArray[np.int64], share: float) -> int:
    return int(np.quantile(values, share)) if len(values) else 0


def even_rows(source: Source, max_samples: int = MAX_SAMPLES, max_shards: int = MAX_SHARDS) -> NDArray[np.int64]:
    """Rows of a source, spread evenly over its shards: int64 [N], ascending; all where they are few."""
    sizes = np.asarray(source.shard_sizes, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    filled = np.flatnonzero(sizes)
    if len(source) <= max_samples and len(filled) <= max_shards:
        return np.arange(len(source), dtype=np.int64)
    shards = filled[np.arange(min(len(filled), max_shards)) * len(filled) // min(len(filled), max_shards)]
    each = max(1, max_samples // len(shards))
    rows = []
    for shard in shards:
        size = int(sizes[shard])
        count = min(size, each)
        rows.append(starts[shard] + np.arange(count) * size // count)
    return np.concatenate(rows)
