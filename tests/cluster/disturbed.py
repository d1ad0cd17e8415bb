"""A job that is disturbed, the run that it must equal, and the table of what it cost."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.cluster.cluster import Cluster, Job, Process
from tests.cluster.sbatch import edited_script
from tests.tiny_run import ROOT, TinyRun
from vlm_dist.data.ledger import LedgerSample, read_ledger

STEPS = 36
#: Micro-batches of a step, of all ranks.
GLOBAL_ACCUMULATION = 8
#: In the environment: every micro-batch takes a third of a second more, on any machine, so that the job outlives what
#: Slurm needs to notice a failure.
SLOW = {"FAULT": "slow:0:forward:0"}
OPTIONS = {
    "data.eval": "[]",
    "peft.lora_dropout": "0",
    "train.max_steps": str(STEPS),
    "train.save_steps": "2",
    "train.save_total_limit": "3",
    "train.sample_ledger": "true",
}


def words(output_dir: str, accumulation: int) -> list[str]:
    """Overrides of a run."""
    overrides = OPTIONS | {
        "train.output_dir": output_dir,
        "train.gradient_accumulation_steps": str(accumulation),
    }
    return [f"{name}={value}" for name, value in overrides.items()]


def submit(cluster: Cluster, run: TinyRun, output_dir: str, *overrides: str, nodes: int = 2, **lines: str | int) -> Job:
    """The run on nodes of one rank each; `lines` are those of #SBATCH options."""
    accumulation = GLOBAL_ACCUMULATION // nodes
    sets = [part for word in (*words(output_dir, accumulation), *overrides) for part in ("--set", word)]
    script = edited_script(run, nodes=nodes, ntasks_per_node=1, gpus_per_node=1, **lines)
    environ = run.environment() | SLOW
    environ["PYTHONPATH"] = f"{ROOT / 'tests' / 'e2e' / 'preload_faults'}:{environ['PYTHONPATH']}"
    return cluster.submit(script, *sets, cwd=run.directory, environ=environ)


def output_of(job: Job, life: int) -> str:
    """What the job wrote in one of its lives, the first being 0."""
    return job.output.partition(f"life {life}:")[2].partition(f"life {life + 1}:")[0]


def steps_of(job: Job, life: int) -> list[int]:
    """Steps that were done in one of its lives."""
    return [int(number) for number in re.findall(rf"  step (\d+)/{STEPS}  epoch", output_of(job, life))]


def find_trainer(cluster: Cluster, node: str) -> Process:
    """The rank of a node, not what has started it."""
    started = cluster.processes(node, "-m vlm_dist.train --config")
    return next(process for process in started if "launcher." not in process.command)


def first_step_after(job: Job, life: int) -> int | None:
    """The first step that a later life has done; None: not yet.

    The life after a failure may end at its start: a node that comes back can have a step of the same number left, with
    which Slurm ends the new one.
    """
    steps = [step for later in range(life + 1, job.restarts + 1) for step in steps_of(job, later)]
    return steps[0] if steps else None


def nodes_of(cluster: Cluster, job: Job) -> list[str]:
    """In the order of ranks."""
    return cluster.login("scontrol", "show", "hostnames", job.facts()["NodeList"]).stdout.split()


def wait_until(is_so: Callable[[], bool], job: Job, limit: float = 120) -> float:
    """Wait; gives back the monotonic time at which it was so, in seconds."""
    deadline = time.monotonic() + limit
    while not is_so():
        assert time.monotonic() < deadline, f"{job.state}:\n{job.output}"
        time.sleep(0.1)
    return time.monotonic()


def assert_undisturbed(run: TinyRun, output_dir: str, *overrides: str) -> None:
    """Every step once, with the samples of the same run in one process, and its adapter to rounding."""
    alone = f"{output_dir}-alone"
    ended = run.train(*words(alone, GLOBAL_ACCUMULATION), *overrides)
    assert ended.exit_code == 0, ended.output
    expected, got = run.directory / alone, run.directory / output_dir
    assert [record["step"] for record in run.metrics(output_dir)] == [r["step"] for r in run.metrics(alone)]
    assert _samples(got) == _samples(expected)
    tensors, others = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (expected, got))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def _samples(output_dir: Path) -> dict[int, Sequence[LedgerSample]]:
    """What each step was trained on."""
    return {step: record.samples for step, record in read_ledger(output_dir).items()}


def report(event: str, **figures: float) -> None:
    """A line for the table of docs, where CLUSTER_REPORT names a file; seconds since the event."""
    if path := os.environ.get("CLUSTER_REPORT"):
        with Path(path).open("a") as file:
            rounded = {name: round(value, 1) for name, value in figures.items()}
            file.write(json.dumps({"event": event, **rounded}) + "\n")
