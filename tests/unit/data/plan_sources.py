"""Sources and length models without data, for tests of the plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlm_dist.data.index.facts import FACTS_DTYPE
from vlm_dist.data.lengths import Costs


class FakeSource:
    """Shards of some sizes; facts are all zero."""

    def __init__(self, sizes, name="a"):
        self.name = name
        self.shard_sizes = list(sizes)
        self.manifest_hash = f"{name}{sizes}"

    def __len__(self):
        return sum(self.shard_sizes)

    def facts(self, rows):
        return np.zeros(len(rows), dtype=FACTS_DTYPE)


@dataclass
class FakeLengths:
    """Costs as a function of source and row."""

    num_keys: int = 1
    longest: int = 1000
    seed: int = 0

    @property
    def digest(self):
        return f"fake-{self.num_keys}-{self.longest}-{self.seed}"

    @property
    def mixes_all(self):
        return self.num_keys == 1

    def costs(self, source, rows):
        mixed = (np.asarray(rows) * 7919 + source * 104729 + self.seed * 31) % 100_003
        tokens = (mixed * mixed) % self.longest + 1  # many short, few long
        return Costs(tokens, np.where(mixed % 3, tokens // 4, 0), mixed % self.num_keys)


def refs_of(step):
    return [ref for micro_batch in step.micro_batches for ref in micro_batch if ref is not None]


def costs_of(plan, refs):
    """[N, 3]: tokens, patches, batch key."""
    costs = plan.costs(refs)
    return np.stack([costs.tokens, costs.patches, costs.batch_key], axis=1)
