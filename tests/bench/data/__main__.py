"""Our loader and its peers on the same pictures; padding and balance of our three ways to make micro-batches.

    make bench-data                  10 minutes on 2 cores, environments apart
    make bench-data BENCH=quick      our own figures alone, in less than a minute
    python -m tests.bench.data --loaders ours,streaming --figures raw,train

Prints a line of JSON per figure and writes docs/benchmarks/data.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from tests.bench.batching import MODES, measure_batching
from tests.bench.data.environments import ROOT, make_environments
from tests.bench.data.figures import (
    AIM_RAW_RATIO,
    AIM_RESUME_SPREAD,
    AIM_TRAIN_RATIO,
    FULL_SCALE,
    OURS,
    PEERS,
    POSITIONS,
    QUICK_SCALE,
    TUNED,
    Answers,
    ask_all,
    questions,
    slope,
)
from tests.bench.data.page import write_data_page
from tests.bench.data.pictures import FULL, QUICK, make_pictures, texts
from tests.bench.data.processes import MeasureError
from tests.bench.data.task import DECODED_SIDE, Task
from tests.bench.lengths import MIXES
from tests.bench.report import Report

FOLDER = ROOT / ".bench" / "data"
LOG = ROOT / ".bench" / "data.log"
#: The mixes' figures are of 16 ranks; `make bench-scale` has more.
BATCHING_RANKS = 16
AIM_PADDING = {"packing": 0.0, "group_by_length": 0.08}
AIM_BALANCE = {"packing": 1.05, "group_by_length": 1.1}
#: Small, so that 10,000 samples take seconds: leaks do not depend on the number of patches.
MEMORY_PIXELS = 112 * 112


def main() -> int:
    """Measure, print, write; 1 where something of ours could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="our own figures, from few pictures")
    parser.add_argument("--loaders", help=f"of {','.join((OURS, *PEERS, TUNED))}")
    parser.add_argument("--figures", help="beginnings of their names, as in raw,decode,training,first,resume,memory")
    parser.add_argument("--rounds", type=int, help="measurements of every figure")
    parser.add_argument("--page", type=Path, help="where the page is written")
    options = parser.parse_args()
    chosen = tuple(options.loaders.split(",")) if options.loaders else (OURS, *PEERS, TUNED)
    loaders = (OURS,) if options.quick else chosen
    if loaders != (OURS,):
        make_environments()
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.write_text("")
    scale = QUICK_SCALE if options.quick else FULL_SCALE
    scale = replace(scale, rounds=options.rounds or scale.rounds)
    sets = [
        (one.name.removesuffix("-quick"), make_pictures(FOLDER, one).parent, one.num_samples)
        for one in (QUICK if options.quick else FULL)
    ]
    asked = questions(sets, _processor("processor", DECODED_SIDE * DECODED_SIDE), scale)
    if options.figures:
        asked = [one for one in asked if one.key.startswith(tuple(options.figures.split(",")))]
    small = _processor("processor-small", MEMORY_PIXELS)
    memory = Task(str(sets[0][1]), sets[0][2], small, num_workers=2, limit=scale.memory_samples)
    if options.figures and "memory" not in options.figures.split(","):
        memory = Task(str(sets[0][1]), sets[0][2], small, num_workers=2, limit=0)
    report = Report()
    try:
        answers = ask_all(loaders, asked, scale, memory, LOG)
    except MeasureError as error:
        print(f"bench-data: {error}", file=sys.stderr)
        return 1
    _report(report, answers, [question.key for question in asked])
    _report_batching(report, num_samples=16_384 if options.quick else 65_536)
    report.summarise()
    default = ROOT / ".bench" / "data-quick.md" if options.quick else ROOT / "docs" / "benchmarks" / "data.md"
    whole = not (options.loaders or options.figures or options.rounds)
    page = options.page or (default if whole else ROOT / ".bench" / "data-part.md")
    write_data_page(page, "make bench-data" + (" BENCH=quick" if options.quick else ""), report, answers, scale, sets)
    print(f"wrote {page}", file=sys.stderr)
    return 0


def _processor(name: str, max_pixels: int) -> str:
    """Save the processor that all loaders load: Qwen2-VL's classes, a small tokenizer that knows the texts."""
    from vlm_dist.demo.tiny_model import DEFAULT_CORPUS, TinyShape, build_processor, build_tokenizer

    shape = TinyShape(min_pixels=56 * 56, max_pixels=max_pixels)
    folder = FOLDER / name
    build_processor(shape, build_tokenizer([*DEFAULT_CORPUS, *texts()], 600)).save_pretrained(folder)
    return str(folder)


def _report(report: Report, answers: Answers, keys: list[str]) -> None:
    for key in keys:
        if not key.startswith("resume"):
            _report_compared(report, answers, key)
    _report_compared(report, answers, "imports")
    for key in keys:
        if key.startswith("resume"):
            _report_compared(report, answers, key)
    places = [median for name in POSITIONS if (median := answers.median(f"resume/{name}", OURS)) is not None]
    if len(places) == len(POSITIONS):
        report.add("resume/slowest over fastest position", max(places) / min(places), "ratio", AIM_RESUME_SPREAD)
    for loader, points in answers.points.items():
        if points:
            report.add(f"memory after {points[-1][0]} samples/{loader}", points[-1][1], "MiB")
            report.add(f"memory slope/{loader}", slope(points), "MiB per 1000 samples")


def _report_compared(report: Report, answers: Answers, key: str) -> None:
    value = answers.median(key, OURS)
    if value is None:
        return
    seconds = key.startswith(("first", "resume", "imports"))
    unit = "s" if seconds else "samples/s"
    peers = {name: median for name in (*PEERS, TUNED) if (median := answers.median(key, name)) is not None}
    if not peers:
        report.add(f"{key}/{OURS}", value, unit)
    for name, median in peers.items():
        aim = AIM_RAW_RATIO if key.startswith("raw") and name == "webdataset" else None
        ratio = answers.ratio(key, name, lower_is_better=seconds)
        report.add(
            f"{key}/{OURS} against {name}", value, unit, peer=name, peer_value=median, ratio=ratio, ratio_aim=aim
        )
    own = {name: median for name, median in peers.items() if name != TUNED}
    if key.startswith("training") and own:
        best = max(own, key=lambda name: own[name])
        ratio = answers.ratio(key, best)
        report.add(
            f"{key}/{OURS} against the best peer",
            value,
            unit,
            peer=best,
            peer_value=own[best],
            ratio=ratio,
            ratio_aim=AIM_TRAIN_RATIO,
        )


def _report_batching(report: Report, num_samples: int) -> None:
    for mix in MIXES:
        for mode in MODES:
            figures = measure_batching(mix, mode, BATCHING_RANKS, num_samples=num_samples)
            where = f"{mix}/{mode}"
            report.add(f"{where}/padding", figures.padding_share, "share", AIM_PADDING.get(mode))
            slowest = max(figures.token_max_over_mean, figures.patch_max_over_mean)
            report.add(f"{where}/max over mean of the ranks' costs", slowest, "ratio", AIM_BALANCE.get(mode))


if __name__ == "__main__":
    sys.exit(main())
