"""`make bench-ranks`: how much of many ranks' time is spent on samples, by the way in which micro-batches are made.

python -m tests.bench.ranks [--quick]
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tests.bench.lengths import MIXES, MixLengths
from tests.bench.ranks.batches import OurSteps, Setting, TrainerSteps, collect
from tests.bench.ranks.figures import Figures, TimeModel
from tests.bench.ranks.page import NAMES, OURS, THEIRS, page
from tests.bench.report import ROOT, Report, write_page

WORLD_SIZES = (8, 16, 64, 1024)
SHAPES = ((8, 1), (1, 8), (8, 4))  # samples per device, accumulation
MIN_SAMPLES, MAX_STEPS, MIN_STEPS = 131_072, 400, 6
CUT_SECONDS = 2.0  # no further step is cut after this
GIVE_UP_SECONDS = 90.0  # a single step that takes longer to cut is none that a run could use

AIM_WORLD_SIZE, AIM_SHAPE = 16, (8, 1)
AIM_OVER_GROUPED = {"images": 1.3, "mix": 1.8}


class TooSlowError(Exception):
    """A step could not be cut in bearable time."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Give up on what takes longer.

    Raises:
        TooSlowError: it did.
    """

    def ring(*_: Any) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(name: str, mix: MixLengths, setting: Setting, model: TimeModel, num_steps: int) -> Figures:
    """Cut and cost steps in one way.

    Args:
        name: of `OURS` or `THEIRS`.
        mix: of lengths.
        setting: of the steps.
        model: of time.
        num_steps: at most so many.

    Raises:
        TooSlowError: not one step could be cut.
    """
    num_samples = max(MIN_SAMPLES, setting.batch * (MIN_STEPS + 1))
    costs = mix.costs(0, np.arange(num_samples + 10_000, dtype=np.int64))
    tokens, tiles = costs.tokens, costs.patches
    steps: Any
    if name in OURS:
        steps = OurSteps(name, mix, setting, num_samples)  # type: ignore[arg-type]
    else:
        steps = TrainerSteps(name.removeprefix("Trainer's "), tokens[:num_samples].tolist(), setting)
    with within(GIVE_UP_SECONDS):
        found, seconds = collect(
            steps, tokens, tiles, is_packed=name == "packing", num_steps=num_steps, seconds=CUT_SECONDS
        )
    return Figures.of(found, model, seconds)


def main() -> None:
    """Measure, print, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 and 16 ranks, few steps, and no page")
    quick = parser.parse_args().quick
    report, model = Report(), TimeModel.of_true_size()
    found: dict[tuple[str, int, tuple[int, int], str], Figures | None] = {}
    for mix in MIXES:
        lengths = MixLengths(mix)
        for world_size in WORLD_SIZES[:2] if quick else WORLD_SIZES:
            for shape in SHAPES:
                for name in NAMES:
                    try:
                        figures = measure(name, lengths, Setting(world_size, *shape), model, 20 if quick else MAX_STEPS)
                    except TooSlowError:
                        found[mix, world_size, shape, name] = None
                        continue
                    found[mix, world_size, shape, name] = figures
                    where = f"{mix}/{world_size} ranks/{shape[0]} x {shape[1]}/{name}"
                    report.add(f"{where}/useful share", figures.useful, "share")
                    report.add(f"{where}/useful share of time", figures.useful_time, "share")
                _compare(report, found, mix, world_size, shape)
    report.summarise()
    if not quick:
        packages = ("transformers", "numpy", "vlm-dist")
        body = page(found, report, model)
        write_page(ROOT / "docs" / "benchmarks" / "ranks.md", "Ranks that wait", "make bench-ranks", packages, body)


def _compare(report: Report, found: Any, mix: str, world_size: int, shape: tuple[int, int]) -> None:
    """Our packs beside what Trainer offers."""
    ours = found[mix, world_size, shape, "packing"]
    for name in THEIRS:
        theirs = found[mix, world_size, shape, name]
        if theirs is None:
            continue
        aim = None
        if name.endswith("batch_rebalance"):
            aim = 1.0
        elif name.endswith("group_by_length") and world_size == AIM_WORLD_SIZE and shape == AIM_SHAPE:
            aim = AIM_OVER_GROUPED.get(mix)
        report.add(
            f"{mix}/{world_size} ranks/{shape[0]} x {shape[1]}/packing beside {name}",
            ours.useful,
            "share",
            peer=name,
            peer_value=theirs.useful,
            ratio=ours.useful / theirs.useful,
            ratio_aim=aim,
        )


if __name__ == "__main__":
    main()
