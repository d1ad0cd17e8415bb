"""The planner at the size of 10^9 samples and 1024 ranks, and what its batches cost: `make bench-scale`.

    python -m tests.bench.scale [--no-files]

Every plan is made in a process of its own, which says how long it took since it was started, and its peak memory.
`from files` is the same from shards on disk: 10^5 of them with a manifest, and real indexes for those that the first
plan needs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.bench.batching import ACCUMULATION, MODES, PER_DEVICE, measure_batching
from tests.bench.lengths import MIXES, MixLengths, SizedSource
from tests.bench.report import ROOT, Report, write_page
from tests.bench.scale_page import batching_table, files_table, scale_table
from tests.bench.shard_files import make_shards, rows_planned_with
from vlm_dist.data.plan.plan import Plan, PlanSettings
from vlm_dist.data.types import Layout, PackBudget

COMMAND = "make bench-scale"
NUM_SHARDS, SHARD_SAMPLES, WORLD_SIZE, RANKS_PER_NODE = 100_000, 10_000, 1024, 8
BATCH = PER_DEVICE * WORLD_SIZE
POSITIONS = {"start": 0.0, "1%": 0.01, "50%": 0.5, "99%": 0.99}
REPEATS = 3
BATCHING_RANKS = (8, 16, 64)

AIM_SECONDS, AIM_MEGABYTES, AIM_STATE_BYTES, AIM_RESUME_RATIO = 10.0, 1024.0, 1024.0, 1.25
AIM_PADDING = {"group_by_length": 0.08, "packing": 0.0}
AIM_BALANCE = {"group_by_length": 1.1, "packing": 1.05}


def main() -> None:
    """Measure everything, print a JSON line per figure, and write the page."""
    parser = argparse.ArgumentParser(description="the planner at scale")
    parser.add_argument("--no-files", action="store_true", help="leave out what makes 200,000 files")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(_plan(**json.loads(options.child))))
        return
    report = Report()
    _measure_scale(report)
    if not options.no_files:
        with tempfile.TemporaryDirectory() as folder:
            _measure_files(report, Path(folder))
    _measure_batching(report)
    report.summarise()
    write_page(
        ROOT / "docs" / "benchmarks" / "scale.md",
        "The planner at scale",
        COMMAND,
        ("numpy", "pyarrow", "vlm-dist"),
        _page(report),
    )


def _settings(mode: str) -> PlanSettings:
    return PlanSettings(BATCH, PER_DEVICE, mode, pack=PackBudget(16_384), balance_scope="world")  # type: ignore[arg-type]


def _first_step(plan: Plan, share: float) -> int:
    return min(int(plan.num_steps * share), plan.num_steps - 1)


def _plan(mode: str, share: float, began: float, folder: str | None = None) -> dict[str, float]:
    """Make the plan of one step in this process, which began at that time, and the steps that follow."""
    layout = Layout(WORLD_SIZE, RANKS_PER_NODE)
    if folder is None:
        lengths = MixLengths("heavy tail")
        plan = Plan([SizedSource([SHARD_SAMPLES] * NUM_SHARDS)], [1.0], _settings(mode), lengths, layout)
    else:
        from vlm_dist.data.sources import open_source

        source = open_source(SimpleNamespace(type="tar", path=folder, name="files"))
        plan = Plan([source], [1.0], _settings(mode), None, layout)
    opened = time.time() - began
    step = _first_step(plan, share)
    jobs = plan.step(step).for_rank(7, WORLD_SIZE)
    seconds = time.time() - began
    assert jobs
    started = time.perf_counter()
    num_more = min(4, plan.num_steps - 1 - step)
    for index in range(step + 1, step + 1 + num_more):
        plan.step(index).for_rank(7, WORLD_SIZE)
    return {
        "seconds": seconds,
        "opened_seconds": opened,
        "step_seconds": (time.perf_counter() - started) / max(num_more, 1),
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "state_bytes": len(json.dumps(plan.state(step)).encode()),
    }


def _in_child(**request: Any) -> dict[str, float]:
    request["began"] = time.time()
    command = [sys.executable, "-m", "tests.bench.scale", "--child", json.dumps(request)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{request}: {done.stderr.strip().splitlines()[-1]}")
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _measure_scale(report: Report) -> None:
    """Start, and resume anywhere; positions take turns, so that a busy moment of the machine meets them all."""
    for mode in MODES:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in POSITIONS}
        for _ in range(REPEATS):
            for name, share in POSITIONS.items():
                found[name].append(_in_child(mode=mode, share=share))
        seconds = {name: statistics.median(one["seconds"] for one in some) for name, some in found.items()}
        everything = [one for some in found.values() for one in some]
        report.add(f"{mode}/first plan", seconds["start"], "s", AIM_SECONDS)
        for name in list(POSITIONS)[1:]:
            report.add(f"{mode}/resume at {name}", seconds[name], "s", AIM_SECONDS)
        worst = max(seconds[name] for name in list(POSITIONS)[1:])
        report.add(f"{mode}/slowest resume over start", worst / seconds["start"], "ratio", AIM_RESUME_RATIO)
        report.add(f"{mode}/memory", max(one["megabytes"] for one in everything), "MB", AIM_MEGABYTES)
        report.add(f"{mode}/state", max(one["state_bytes"] for one in everything), "bytes", AIM_STATE_BYTES)
        report.add(f"{mode}/next step", statistics.median(one["step_seconds"] for one in everything), "s")


def _measure_files(report: Report, folder: Path) -> None:
    for mode, share in (("group_by_length", 0.0), ("group_by_length", 0.5), ("packing", 0.5)):
        where = f"{mode} from files/{'start' if share == 0 else '50%'}"
        plan = Plan([SizedSource([SHARD_SAMPLES] * NUM_SHARDS)], [1.0], _settings(mode), MixLengths("images"))
        num_indexes = make_shards(folder, NUM_SHARDS, SHARD_SAMPLES, rows_planned_with(plan, _first_step(plan, share)))
        found = _in_child(mode=mode, share=share, folder=str(folder))
        report.add(f"{where}/first plan", found["seconds"], "s", AIM_SECONDS)
        report.add(f"{where}/of which opening the source", found["opened_seconds"], "s")
        report.add(f"{where}/memory", found["megabytes"], "MB", AIM_MEGABYTES)
        report.add(f"{where}/indexes read", num_indexes, "files")


def _measure_batching(report: Report) -> None:
    for mix in MIXES:
        for mode in MODES:
            for ranks in BATCHING_RANKS:
                for accumulation in (ACCUMULATION, 1) if mode == "group_by_length" else (ACCUMULATION,):
                    figures = measure_batching(mix, mode, ranks, accumulation)
                    where = f"{mix}/{mode}/{ranks} ranks" + ("" if accumulation > 1 else "/one micro-batch")
                    report.add(f"{where}/padding", figures.padding_share, "share", AIM_PADDING.get(mode))
                    for cost, costs in (("token", "tokens"), ("patch", "patches")):
                        value = getattr(figures, f"{cost}_max_over_mean")
                        report.add(f"{where}/max over mean of {costs}", value, "ratio", AIM_BALANCE.get(mode))
                        rows = getattr(figures, f"{cost}_row_max_over_mean")
                        report.add(f"{where}/max over mean of {costs}, row by row", rows, "ratio")


def _page(report: Report) -> str:
    lines = [
        f"{NUM_SHARDS * SHARD_SAMPLES:,} samples in {NUM_SHARDS:,} shards, {WORLD_SIZE} ranks, global batch {BATCH:,}.",
        "Every plan is made in a process of its own; seconds count from its start, imports included (median of",
        f"{REPEATS}); memory is the most that it had.",
        "",
        *scale_table(report, MODES),
        "",
        f"Aims: first plan below {AIM_SECONDS:g} s and {AIM_MEGABYTES:g} MB, state below 1 KB, resume as fast as the",
        "start.",
        "",
        *files_table(report),
        "## Padding and balance",
        "",
        f"The mixes of `tests/bench/lengths.py`; steps of {PER_DEVICE} samples x {ACCUMULATION} x ranks (grouped also",
        "with one micro-batch per rank, where nothing evens out), packs of up to 16,384 tokens; costs as the planner",
        "knows them. Padding is pad tokens / computed tokens. Max/mean is the slowest rank's cost over the mean of the",
        "ranks, over whole steps, and row by row: as if ranks waited for each other after every micro-batch, as under",
        "ZeRO-3. Patches are tiles of the vision tower.",
        "",
        *batching_table(report),
        "",
        "Aims: grouped padding below 8% and max/mean below 1.1; packed no padding and max/mean below 1.05.",
    ]
    missed = [figure.name for figure in report.figures if not figure.is_met]
    return "\n".join([*lines, f"Missed: {'; '.join(missed)}." if missed else "All aims are met."])


if __name__ == "__main__":
    main()
