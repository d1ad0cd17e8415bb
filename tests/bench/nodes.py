"""What training sends over the network in each optimizer step, and what a slow network costs: `make bench-nodes`.

    python -m tests.bench.nodes [--quick]

Whole runs of slurm/train.sbatch on the tests' cluster (`tests/cluster`), one rank a node: bytes by the counters of the
nodes' network devices, seconds at links of three rates, which change while a run trains.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from tests.bench.nodes_page import page
from tests.bench.report import ROOT, Report, write_page
from tests.cluster.cluster import Cluster, Job, running_cluster, why_not
from tests.cluster.sbatch import edited_script
from tests.tiny_run import TinyRun, make_tiny_run
from vlm_dist.demo.tiny_model import TinyShape
from vlm_dist.distributed.zero_traffic import Traffic

COMMAND = "make bench-nodes"
#: A step of this takes less than a second, and ZeRO-3 has to gather 20 MB for it.
SHAPE = TinyShape(hidden_size=512, intermediate_size=1024, num_layers=4, num_heads=8, vision_dim=64, vision_depth=1)
LORA_R = 64
ACCUMULATION = 2
#: As `tc` spells them, in bit/s.
RATES = {"10gbit": 10e9, "1gbit": 1e9, "100mbit": 100e6}
UNSHAPED = "none"
NODE_COUNTS = (1, 2, 4)
#: Of a run at one rate. The first is left out: the rate changed in its midst.
STEPS_PER_RATE = 6
#: The network must not be the sum of what else is sent: votes, heartbeats, Slurm's own.
AIM_OVER_FORMULA = 1.05


@dataclass(frozen=True)
class Sent:
    """One layout, measured.

    Attributes:
        layout: what was trained how.
        step_bytes: rate -> what the busiest node sent in a step.
        step_seconds: rate -> seconds of a step.
    """

    layout: Traffic
    step_bytes: dict[str, float]
    step_seconds: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all layouts, print figures, and write docs/benchmarks/nodes.md."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.nodes", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="two nodes, ZeRO-2, links of 100 Mbit/s; no page is written"
    )
    options = parser.parse_args(arguments)
    if (reason := why_not()) is not None:
        parser.error(f"there can be no cluster: {reason}")
    node_counts = (2,) if options.quick else NODE_COUNTS
    stages = (2,) if options.quick else (1, 2, 3)
    rates = ("100mbit",) if options.quick else tuple(RATES)

    report = Report()
    with tempfile.TemporaryDirectory(prefix="vlm-dist-nodes-") as directory:
        run = make_run(Path(directory))
        measured = []
        for num_nodes in node_counts:
            with running_cluster(num_nodes) as cluster:
                for stage in stages:
                    sent = train(cluster, run, stage, rates if num_nodes > 1 else ())
                    add_figures(report, sent)
                    measured.append(sent)
    report.summarise()
    if not options.quick:
        write_page(
            ROOT / "docs" / "benchmarks" / "nodes.md",
            "Communication between nodes",
            COMMAND,
            ("torch", "deepspeed", "vlm-dist"),
            page([(sent.layout, sent.step_bytes, sent.step_seconds) for sent in measured], RATES, UNSHAPED),
        )


def make_run(directory: Path) -> TinyRun:
    """Model, data and configs, with ZeRO-3 as it is on a model that is bigger than its buffers."""
    import torch

    run = make_tiny_run(directory, dtype=torch.bfloat16, shape=SHAPE)
    for stage in (1, 2, 3):
        preset = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
        if stage == 3:
            # In proportion to the model: else it would all be kept from forward to backward, as no large one can be.
            preset["zero_optimization"] |= {
                "stage3_prefetch_bucket_size": 2_000_000,
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
            }
        (directory / "ds_configs" / f"nodes{stage}.json").write_text(json.dumps(preset))
    return run


def train(cluster: Cluster, run: TinyRun, stage: int, rates: Sequence[str]) -> Sent:
    """Train at every rate, and end the job.

    Args:
        cluster: of as many nodes as train.
        run: what is trained.
        stage: of ZeRO.
        rates: of the links, one after the other; before them comes `UNSHAPED`.
    """
    num_nodes = len(cluster.nodes)
    name = f"zero{stage}-{num_nodes}"
    log = run.directory / f"wire-{name}"
    log.mkdir()
    environ = run.environment() | {"WIRE_LOG": str(log)}
    environ["PYTHONPATH"] = f"{Path(__file__).parent / 'preload_wire'}:{environ['PYTHONPATH']}"
    job = cluster.submit(
        edited_script(run, nodes=num_nodes, ntasks_per_node=1, gpus_per_node=1),
        *overrides(f"ds_configs/nodes{stage}.json", name),
        cwd=run.directory,
        environ=environ,
    )
    first_steps: dict[str, int] = {}
    try:
        cluster.manage("shape", UNSHAPED)
        # two steps to warm up: buffers, the first gathers' trace
        first_steps[UNSHAPED] = 3
        last = wait_for_step(job, log, first_steps[UNSHAPED] + STEPS_PER_RATE)
        for rate in rates:
            assert cluster.manage("shape", rate).exit_code == 0
            first_steps[rate] = newest_step(log) + 2
            last = wait_for_step(job, log, first_steps[rate] + STEPS_PER_RATE)
        assert last
    finally:
        cluster.manage("shape", UNSHAPED)
        job.cancel()
        job.wait()
    notes = [read_notes(log / f"rank-{rank}") for rank in range(num_nodes)]
    adapter = next((run.directory / name).glob("*/adapter_model.safetensors"))
    layout = Traffic(
        stage,
        num_nodes,
        ACCUMULATION,
        num_trained=sum(sizes(adapter)),
        num_gathered=num_gathered(run),
        reduces_whole=True,
    )
    step_bytes, step_seconds = {}, {}
    for rate, first in first_steps.items():
        last = first + STEPS_PER_RATE - 1
        step_bytes[rate] = max((each[last]["sent"] - each[first]["sent"]) / (last - first) for each in notes)
        times = [notes[0][step]["seconds"] for step in range(first, last + 1)]
        step_seconds[rate] = statistics.median(later - earlier for earlier, later in itertools.pairwise(times))
    return Sent(layout, step_bytes, step_seconds)


def overrides(deepspeed: str, output_dir: str) -> list[str]:
    """What follows the script's name."""
    settings = {
        "deepspeed": deepspeed,
        "data.train": json.dumps(
            [{"name": "images", "type": "tar", "path": "data/images", "columns": {"image": "png"}}]
        ),
        "data.eval": "[]",
        "peft.r": LORA_R,
        "train.per_device_train_batch_size": 1,
        "train.gradient_accumulation_steps": ACCUMULATION,
        "train.max_steps": 10_000,
        "train.logging_steps": 1000,
        "train.output_dir": output_dir,
    }
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


def read_notes(path: Path) -> dict[int, dict[str, float]]:
    """What a rank noted, by step; the last line may be half written."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {note["step"]: note for note in map(json.loads, lines)}


def newest_step(log: Path) -> int:
    """Steps that rank 0 has done."""
    return max(read_notes(log / "rank-0"), default=0)


def wait_for_step(job: Job, log: Path, step: int, seconds: float = 180) -> int:
    """Until rank 0 has done so many steps; gives back how many it has."""
    deadline = time.monotonic() + seconds
    while (done := newest_step(log)) < step:
        assert time.monotonic() < deadline and job.state in ("PENDING", "RUNNING", "CONFIGURING"), job.output
        time.sleep(0.5)
    return done


def num_gathered(run: TinyRun) -> int:
    """Elements of the base that ZeRO-3 cuts: those of parameters that are not small."""
    zero = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())["zero_optimization"]
    files = (run.directory / "model").glob("*.safetensors")
    return sum(size for path in files for size in sizes(path) if size >= zero["stage3_param_persistence_threshold"])


def sizes(path: Path) -> list[int]:
    """Elements of every tensor of a safetensors file."""
    with safe_open(path, "pt") as file:
        return [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118 - not a dict


def add_figures(report: Report, sent: Sent) -> None:
    """Print one layout."""
    layout = sent.layout
    name = f"ZeRO-{layout.stage}, {layout.num_ranks} nodes"
    formula = layout.sent_bytes
    report.add(f"{name}/step", sent.step_seconds[UNSHAPED], "s")
    if layout.num_ranks == 1:
        return
    report.add(
        f"{name}/sent by a node", sent.step_bytes[UNSHAPED], "B/step", aim=AIM_OVER_FORMULA * formula,
        peer="formula", peer_value=formula, ratio=formula / sent.step_bytes[UNSHAPED],
    )  # fmt: skip
    for rate, seconds in sent.step_seconds.items():
        if rate != UNSHAPED:
            report.add(f"{name}/waiting at {rate}", seconds - sent.step_seconds[UNSHAPED], "s/step")


if __name__ == "__main__":
    main()
