"""`make bench`: whole training runs, ours beside the peers', each in an environment of its own.

    python -m tests.bench.training [--quick] [--trainers ours,hf_trainer] [--rounds 2]

Prints a line of JSON per figure, and writes docs/benchmarks/training.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.bench.data.environments import ROOT, make_environments
from tests.bench.report import Report, write_page
from tests.bench.training.figures import (
    OURS,
    RESUMED,
    SETTINGS,
    Results,
    Resumptions,
    resume_all,
    run_rounds,
    ways,
)
from tests.bench.training.job import Job
from tests.bench.training.page import page
from tests.bench.training.runs import NUM_RANKS
from tests.bench.training.samples import EQUAL, MANY, MIX, make_many, make_samples

FOLDER = ROOT / ".bench" / "training"
AIM_DEFAULT, AIM_BEST, AIM_EQUAL, AIM_RESUME = 2.0, 1.15, 1.1, 5.0
NUM_STEPS, SAVE_AT, ROUNDS = 9, 6, 2
#: Of a run; of each of the two runs of a resumption.
DEADLINE_SECONDS, RESUME_SECONDS = 240.0, 150.0


def main() -> int:
    """Measure, print, write; 1 where ours could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ours and Hugging Face's Trainer, one round")
    parser.add_argument("--trainers", help=f"of {','.join(SETTINGS)}")
    parser.add_argument("--rounds", type=int, help="how often every run is made")
    parser.add_argument("--page", type=Path, help="where the page is written")
    options = parser.parse_args()
    chosen = ("ours", "hf_trainer") if options.quick else tuple(SETTINGS)
    trainers = tuple(options.trainers.split(",")) if options.trainers else chosen
    unknown = [name for name in trainers if name not in SETTINGS]
    if unknown or OURS not in trainers:
        parser.error(f"--trainers: expected {OURS} and some of {', '.join(SETTINGS)}, got {options.trainers}")
    make_environments(trainers)
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    report = Report()
    found: dict[str, Results] = {}
    for samples in (MIX, EQUAL):
        data = make_samples(FOLDER, samples)
        num_steps, save_at = (NUM_STEPS, SAVE_AT) if samples is MIX else (NUM_STEPS - 2, 0)
        job = Job("", "", str(data), str(data / "model"), "", num_steps, save_at=save_at)
        asked = ways(trainers, only_default=samples is EQUAL or options.quick)
        for results in run_rounds(job, asked, rounds, DEADLINE_SECONDS, FOLDER):
            found[samples.name] = results
        _report(report, samples.name, found[samples.name], trainers)
    job = Job("", "", str(make_many(FOLDER, FOLDER / MIX.name)), str(FOLDER / MIX.name / "model"), "", 0)
    middle = MANY // (2 * NUM_RANKS * job.per_device)
    resumed = resume_all(job, [way for way in RESUMED if way[0] in trainers], middle, RESUME_SECONDS, FOLDER)
    _report_resumed(report, resumed)
    report.summarise()
    if not found["mix"].runs.get((OURS, "packing")):
        print(f"bench: ours could not be measured: {found['mix'].reasons}", file=sys.stderr)
        return 1
    whole = not (options.quick or options.trainers or options.rounds)
    path = options.page or (ROOT / "docs" / "benchmarks" / "training.md" if whole else FOLDER / "training.md")
    packages = ("torch", "transformers", "peft", "deepspeed", "vlm-dist")
    write_page(path, "Training beside the peers", "make bench", packages, page(found, resumed, report, rounds))
    print(f"wrote {path}", file=sys.stderr)
    return 0


def _report(report: Report, name: str, results: Results, trainers: tuple[str, ...]) -> None:
    ours = (OURS, "packing")
    own = results.median(ours, "tokens_per_second")
    if own is None:
        return
    for way in results.runs:
        for figure, unit in _FIGURES.items():
            value = results.median(way, figure)
            if value is not None:
                report.add(f"{name}/{'/'.join(way)}/{figure}", value, unit)
    for trainer in (one for one in trainers if one != OURS):
        default = (trainer, SETTINGS[trainer][0])
        compared = {"default": (default, AIM_DEFAULT), "best": (results.best(trainer), AIM_BEST)}
        if name == "equal":
            compared = {"default": (default, AIM_EQUAL)}
        for kind, (way, aim) in compared.items():
            ratio = None if way is None else results.ratio(ours, way)
            if way is None or ratio is None:
                continue
            report.add(
                f"{name}/packing beside {trainer}, {kind} ({way[1]})",
                own,
                "tokens/s",
                peer=trainer,
                peer_value=results.median(way, "tokens_per_second"),
                ratio=ratio,
                ratio_aim=aim,
            )


def _report_resumed(report: Report, resumed: Resumptions) -> None:
    for way, one in resumed.found.items():
        report.add(f"resume/{'/'.join(way)}/import_seconds", one.import_seconds, "s")
        report.add(f"resume/{'/'.join(way)}/first_step_seconds", one.first_step_seconds, "s")
    ours = resumed.found.get((OURS, "packing"))
    for way, one in resumed.found.items():
        if ours is not None and way[0] != OURS:
            report.add(
                f"resume/packing beside {' '.join(way)}{' (at least)' if one.is_over else ''}",
                ours.first_step_seconds,
                "s",
                peer=way[0],
                peer_value=one.first_step_seconds,
                ratio=one.first_step_seconds / ours.first_step_seconds,
                ratio_aim=AIM_RESUME,
            )


_FIGURES = {
    "tokens_per_second": "tokens/s",
    "import_seconds": "s",
    "first_step_seconds": "s",
    "first_loss": "nats",
    "save_seconds": "s",
    "checkpoint_bytes": "bytes",
    "peak_mib": "MiB",
}

if __name__ == "__main__":
    sys.exit(main())
