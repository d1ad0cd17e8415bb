"""Which runs are made, and what comes out of them over the rounds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.bench.training.job import Job
from tests.bench.training.runs import OURS, Resumed, Run, RunError, resume_job, run_job

Way = tuple[str, str]  # trainer, settings

#: Trainer -> the settings that are tried; the first is what its documents begin with, the others what they offer for
#: samples of many lengths.
SETTINGS: dict[str, tuple[str, ...]] = {
    OURS: ("packing", "group_by_length"),
    "hf_trainer": ("default", "group_by_length", "batch_rebalance"),
    "trl_sft": ("default", "group_by_length", "batch_rebalance"),
    "llamafactory": ("default", "group_by_length", "batch_rebalance", "neat_packing"),
    "ms_swift": ("default", "group_by_length", "packing"),
}
#: Not offered by anybody: shows how much of a difference is made by a part.
PART: Way = ("hf_trainer", "our patch embedding")
#: The ways that are resumed: each trainer's first, and rows that are streamed, as where they are too many for a list.
RESUMED: tuple[Way, ...] = (
    *((trainer, settings[0]) for trainer, settings in SETTINGS.items()),
    ("hf_trainer", "streaming"),
)
TITLES = {
    OURS: "vlm-dist",
    "hf_trainer": "Hugging Face Trainer",
    "trl_sft": "TRL SFTTrainer",
    "llamafactory": "LLaMA-Factory",
    "ms_swift": "ms-swift",
}


@dataclass
class Results:
    """Of one set of samples.

    Attributes:
        runs: way -> its runs, one a round; None where it failed.
        reasons: way -> why it failed.
    """

    runs: dict[Way, list[Run]] = field(default_factory=dict)
    reasons: dict[Way, str] = field(default_factory=dict)

    def median(self, way: Way, name: str) -> float | None:
        """Of a figure over the rounds; None where there is none."""
        values = [value for run in self.runs.get(way, ()) if (value := getattr(run, name)) is not None]
        return statistics.median(values) if values else None

    def ratio(self, way: Way, other: Way) -> float | None:
        """Tokens per second of one way / the other's, as the median of the rounds."""
        pairs = zip(self.runs.get(way, ()), self.runs.get(other, ()), strict=False)
        ratios = [one.tokens_per_second / two.tokens_per_second for one, two in pairs]
        return statistics.median(ratios) if ratios else None

    def best(self, trainer: str) -> Way | None:
        """The settings of a trainer with most tokens per second."""
        ways = [way for way in self.runs if way[0] == trainer and way[1] in SETTINGS[trainer]]
        return max(ways, key=lambda way: self.median(way, "tokens_per_second") or 0.0, default=None)


def ways(trainers: tuple[str, ...], *, only_default: bool = False) -> list[Way]:
    """Ways of these trainers, ours first."""
    offered = [(name, one) for name in trainers for one in SETTINGS[name][: 1 if only_default else None]]
    return offered + ([PART] if PART[0] in trainers and not only_default else [])


def run_rounds(job: Job, asked: list[Way], rounds: int, deadline_seconds: float, folder: Path) -> Iterator[Results]:
    """Run all ways, round by round, so that a busy moment of the machine meets them all.

    Args:
        job: of which trainer, settings, and output are filled in.
        asked: in this order.
        rounds: how often.
        deadline_seconds: of one run.
        folder: for outputs and logs.

    Returns:
        The results so far, after every run. What has failed is not tried again.
    """
    results = Results()
    for _ in range(rounds):
        for way in asked:
            if way in results.reasons:
                continue
            name = "-".join(way)
            one = replace(job, trainer=way[0], settings=way[1], output=str(folder / f"run-{name}"))
            try:
                results.runs.setdefault(way, []).append(run_job(one, deadline_seconds, folder / f"{name}.log"))
            except RunError as error:
                results.reasons[way] = str(error)
                results.runs.pop(way, None)
            yield results


@dataclass
class Resumptions:
    """Of one set of samples.

    Attributes:
        found: way -> how long it took.
        reasons: way -> why it failed.
    """

    found: dict[Way, Resumed] = field(default_factory=dict)
    reasons: dict[Way, str] = field(default_factory=dict)


def resume_all(job: Job, asked: list[Way], at: int, deadline_seconds: float, folder: Path) -> Resumptions:
    """Resume each way once at step `at`; arguments as for `run_rounds`, the deadline of each of two runs."""
    results = Resumptions()
    for way in asked:
        name = "-".join(way)
        one = replace(job, trainer=way[0], settings=way[1], output=str(folder / f"resume-{name}"))
        try:
            results.found[way] = resume_job(one, at, deadline_seconds, folder / f"resume-{name}.log")
        except RunError as error:
            results.reasons[way] = str(error)
    return results
