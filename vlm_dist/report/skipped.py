"""Samples that a run could not use: each once, with how often and when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Samples that are shown one by one.
MAX_SHOWN = 24


@dataclass
class SkippedSample:
    """One sample.

    Attributes:
        source: name of its source.
        shard: file that it lies in.
        key: its name there.
        null_class: why, in a word.
        message: why.
        purpose: train or eval.
        steps: in which it was met, ascending; the first few.
        times: how often.
    """

    source: str
    shard: str
    key: str
    null_class: str
    message: str
    purpose: str
    steps: list[int] = field(default_factory=list)
    times: int = 0


@dataclass(frozen=True)
class Skipped:
    """All samples that could not be used.

    Attributes:
        samples: the most frequent first.
        by_class: number of samples: class -> source -> count.
        num_times: how often any was met.
    """

    samples: list[SkippedSample]
    by_class: dict[str, dict[str, int]]
    num_times: int

    @property
    def shown(self) -> list[SkippedSample]:
        """Those that are shown one by one: some of each class."""
        groups: dict[str, list[SkippedSample]] = {}
        for sample in self.samples:
            groups.setdefault(sample.null_class, []).append(sample)
        chosen: list[SkippedSample] = []
        while len(chosen) < MAX_SHOWN and any(groups.values()):
            for group in groups.values():
                if group and len(chosen) < MAX_SHOWN:
                    chosen.append(group.pop(0))
        return chosen


def count_skipped(records: Sequence[Mapping[str, Any]]) -> Skipped:
    """Count records of the quarantine by sample."""
    samples: dict[tuple[str, ...], SkippedSample] = {}
    for record in records:
        identity = tuple(str(record[name]) for name in ("source", "shard", "key", "class", "purpose"))
        source, shard, key, null_class, purpose = identity
        sample = samples.setdefault(
            identity, SkippedSample(source, shard, key, null_class, str(record["message"]), purpose)
        )
        sample.times += 1
        if len(sample.steps) < 8 and record["step"] not in sample.steps:
            sample.steps.append(record["step"])
    counts: dict[str, Counter[str]] = {}
    for sample in samples.values():
        counts.setdefault(sample.null_class, Counter())[sample.source] += 1
    ordered = sorted(samples.values(), key=lambda sample: -sample.times)
    return Skipped(ordered, {name: dict(count) for name, count in counts.items()}, len(records))
