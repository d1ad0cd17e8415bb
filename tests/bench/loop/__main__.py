"""`make bench-loop`: what our loop costs beside a bare one, and what waiting for data costs it.

python -m tests.bench.loop [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tests.bench.report import ROOT, Report, write_page
from tests.bench.training.job import Job
from tests.bench.training.samples import MIX, SampleSet, make_samples
from tests.bench.training.trainers.ours import run_file
from vlm_dist.distributed.group import free_port
from vlm_dist.observability.jsonl import read_metrics

FOLDER = ROOT / ".bench" / "loop"
PAGE = ROOT / "docs" / "benchmarks" / "loop.md"
AIM_OVERHEAD, AIM_WAIT = 1.03, 0.02
DEADLINE_SECONDS = 400.0


@dataclass(frozen=True)
class Case:
    """A run whose loop is measured.

    Attributes:
        name: of it.
        num_ranks: processes.
        per_device: samples of a micro-batch.
        accumulation: micro-batches of a step, where nothing is packed.
        settings: of `trainers.ours`.
        num_steps: of a measurement.
        num_parted: steps whose parts are timed one by one.
    """

    name: str
    num_ranks: int
    per_device: int
    accumulation: int
    settings: str
    num_steps: int
    num_parted: int = 0


CASES = (
    Case("2 ranks, packed", 2, 8, 1, "packing", 1),
    Case("2 ranks, padded, 4 micro-batches", 2, 2, 4, "group_by_length", 1),
    Case("1 rank, packed", 1, 8, 1, "packing", 1),
    Case("2 ranks, next to nothing to compute", 2, 1, 1, "packing", 8, num_parted=200),
)
QUICK_CASES = (CASES[2], replace(CASES[-1], num_steps=4, num_parted=24))
NUM_PAIRS, NUM_QUICK_PAIRS = 24, 3
#: Texts of a few words, so that what is left of a step is its own cost.
NOTHING = SampleSet("nothing", "text", 64)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two cases and few pairs, and no page")
    quick = parser.parse_args().quick
    report, rows, parts, thread = Report(), [], {}, 0.0
    for case in QUICK_CASES if quick else CASES:
        pairs, parts, thread = measure(case, NUM_QUICK_PAIRS if quick else NUM_PAIRS)
        ours, bare = (statistics.median(one[i] for one in pairs) / case.num_steps for i in range(2))
        ratios = sorted(one / other for one, other in pairs)
        ratio = statistics.median(ratios)
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        cost = statistics.median(one - other for one, other in pairs) / case.num_steps
        report.add(f"{case.name}/our step over the bare one", ratio, "ratio", None if case.num_parted else AIM_OVERHEAD)
        report.add(f"{case.name}/cost of our loop", cost * 1e3, "ms")
        rows.append(
            f"| {case.name} | {len(pairs) * case.num_steps} | {bare * 1e3:.0f} ms | {ours * 1e3:.0f} ms | {ratio:.3f} "
            f"| {low:.3f} to {high:.3f} | {cost * 1e3:.1f} ms |"
        )
    for part, microseconds in parts.items():  # of the last case
        report.add(f"fixed cost/{part}", microseconds, "us")
    report.add("fixed cost/thread of the feed, beside the loop", thread, "us")
    if quick:
        report.summarise()
        return 0
    wait = data_wait(40)
    report.add("1 rank, 1 worker/data wait", wait, "share", AIM_WAIT)
    report.summarise()
    packages = ("torch", "deepspeed", "vlm-dist")
    write_page(PAGE, "What the loop costs", "make bench-loop", packages, _body(rows, parts, thread, wait))
    return 0


def measure(case: Case, num_pairs: int) -> tuple[list[tuple[float, float]], dict[str, float], float]:
    """Measure a run.

    Returns:
        Seconds of our loop and of the bare one, in turns; part of our loop -> microseconds of a step; those of the
        thread that fetches steps.
    """
    folder = FOLDER / "run"
    path = _prepare(case, folder)
    output = folder / "pairs.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(case.num_ranks)]
    command += ["--master_port", str(free_port()), "-m", "tests.bench.loop.ranks", str(path), str(output)]
    _run([*command, str(num_pairs), str(case.num_steps), str(case.num_parted)], folder)
    made = json.loads(output.read_text())
    return [tuple(pair) for pair in made["pairs"]], made["parts"], made["thread"]


def data_wait(num_steps: int) -> float:
    """Share of the steps' time that a rank waits for its data, with one worker beside it."""
    folder = FOLDER / "wait"
    case = Case("wait", 1, 8, 1, "packing", num_steps)
    path = _prepare(case, folder, workers=1, num_steps=num_steps)
    _run([sys.executable, "-m", "vlm_dist.train", "--config", str(path), "--set", "train.logging_steps=1"], folder)
    lines = list(read_metrics(folder / "run" / "metrics.jsonl", "train"))[3:]
    seconds = sum(line["step_seconds"] for line in lines)
    return sum(line["data_wait_share"] * line["step_seconds"] for line in lines) / seconds


def _prepare(case: Case, folder: Path, workers: int = 1, num_steps: int = 1000) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    data = make_samples(FOLDER.parent / "training", NOTHING if case.per_device == 1 else MIX)
    job = Job(
        "ours",
        case.settings,
        str(data),
        str(data / "model"),
        str(folder),
        num_steps,
        per_device=case.per_device,
        accumulation=case.accumulation,
        workers=workers,
    )
    return run_file(job)


def _run(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ...: {done.stdout[-1000:]}{done.stderr[-3000:]}")


def _body(rows: list[str], parts: Mapping[str, float], thread: float, wait: float) -> str:
    whole = sum(parts.values())
    return "\n".join(
        [
            "Our loop (feed, agreement of the ranks, seeds, meter, log, progress) beside DeepSpeed's own three calls",
            "over the same micro-batches, which are in memory, on the same engine with the same loss, in turns, each",
            "begun by a barrier, behind a pass that is not timed (but in the last run, whose turns are of 8 steps):",
            f"{NUM_PAIRS} pairs, medians, and the half of the ratios in the middle. float32, one",
            "thread a rank, ZeRO-2, LoRA on the language model of a small Qwen2-VL, the mix of lengths of",
            "`tests/bench/training`. Python's own collector of garbage is off in both loops (ours collects every 50",
            "steps, `gc_steps`, see below). The thread that fetches ahead has done its work before either is timed:",
            f"its own time is {thread:,.0f} microseconds of a step, beside the computation.",
            "",
            "| run | steps measured, each | bare step | our step | ratio | | difference |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"Aim: at most {AIM_OVERHEAD:g} where there is something to compute.",
            "",
            f"Waiting for data, one rank and one worker on two cores, packed: {wait:.1%} of a step (aim: under"
            f" {AIM_WAIT:.0%}).",
            "",
            "## Where it goes",
            "",
            f"Parts of our loop in the last of these runs, timed one by one in {CASES[-1].num_parted} more steps; the",
            "cost is the same however large the model. Each is the median over the steps, or the mean of what not",
            "every step has. *Around DeepSpeed's three calls* is what ours take beyond the same calls in the bare",
            "loop, whose micro-batch has just been there; *everything else* has the stopwatches in it.",
            "",
            "| part | microseconds of a step |",
            "|---|---|",
            *(f"| {part} | {microseconds:,.0f} |" for part, microseconds in parts.items()),
            f"| together | {whole:,.0f} |",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
