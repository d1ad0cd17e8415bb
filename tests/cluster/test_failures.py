"""A job of two nodes whose nodes, network, daemons and ranks fail, one after the other; a third node stands by."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.cluster import Cluster, Job
from tests.cluster.sbatch import edited_script
from tests.tiny_run import TinyRun, make_tiny_run
from vlm_dist.data.ledger import LedgerSample, read_ledger

pytestmark = [pytest.mark.cluster, pytest.mark.long]

NUM_NODES = 3
STEPS = 36
#: Of large steps, a second each, so that the job outlives what Slurm needs to notice a failure.
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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("failures"))


@pytest.fixture(scope="module")
def job(cluster: Cluster, run: TinyRun) -> Iterator[Job]:
    """One job for all failures, each in a life of its own."""
    submitted = submit(cluster, run, "disturbed")
    yield submitted
    submitted.cancel()


def submit(cluster: Cluster, run: TinyRun, output_dir: str, *overrides: str, nodes: int = 2) -> Job:
    """The run on nodes of one rank each."""
    sets = [part for word in (*words(output_dir, 12), *overrides) for part in ("--set", word)]
    script = edited_script(run, nodes=nodes, ntasks_per_node=1, gpus_per_node=1)
    return cluster.submit(script, *sets, cwd=run.directory, environ=run.environment())


def kill_rank(cluster: Cluster, node: str) -> None:
    """The trainer of that node, as the kernel does when memory is short."""
    trainer = next(p for p in cluster.processes(node, "-m vlm_dist.train --config") if "launcher." not in p.command)
    assert cluster.on(node, "kill", "-KILL", str(trainer.pid)).exit_code == 0


def do(command: str) -> Callable[[Cluster, str], None]:
    """A command of cluster.sh on a node."""

    def act(cluster: Cluster, node: str) -> None:
        done = cluster.manage(command, node)
        assert done.exit_code == 0, done.output

    return act


def kill_slurmd(cluster: Cluster, node: str) -> None:
    """On a slow network: training goes on without it, and must not be done before Slurm notices."""
    cluster.manage("shape", "200kbit")
    do("kill-slurmd")(cluster, node)


def start_slurmd(cluster: Cluster, node: str) -> None:
    cluster.manage("shape", "none")
    do("start-slurmd")(cluster, node)


@dataclass(frozen=True)
class Event:
    """Something that fails.

    Attributes:
        name: of the event.
        happens: to a node of the job.
        mended: what makes the node whole again, once Slurm knows that it is down; None: it never was.
        rank: whose node.
        why: what the job's log says of it; empty: it is Slurm who acts.
    """

    name: str
    happens: Callable[[Cluster, str], None]
    mended: Callable[[Cluster, str], None] | None = None
    rank: int = 1
    why: str = ""


EVENTS = [
    Event("rank killed", kill_rank, why="rank 1 on {node} was killed by SIGKILL"),
    Event("slurmd killed", kill_slurmd, start_slurmd),
    Event("node killed", do("kill"), do("up"), rank=0),
    Event("node crashed silently", do("crash"), do("up")),
    Event("network cut and healed", do("cut"), do("heal")),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.name)
def test_the_job_goes_on_elsewhere(event: Event, cluster: Cluster, run: TinyRun, job: Job) -> None:
    life = job.restarts
    wait_until(lambda: "checkpoint written" in output_of(job, life), job)
    node = nodes_of(cluster, job)[event.rank]

    happened = time.monotonic()
    event.happens(cluster, node)
    noticed = wait_until(lambda: job.state != "RUNNING", job) - happened
    reached = max(run.losses("disturbed"))
    restarted = wait_until(lambda: f"life {life + 1}:" in job.output, job) - happened
    if event.mended is not None:
        cluster.wait_for_node(node, "down")
        event.mended(cluster, node)
    trained = wait_until(lambda: steps_of(job, life + 1) != [], job) - happened
    first = steps_of(job, life + 1)[0]

    assert event.why.format(node=node) in output_of(job, life)
    assert reached - first + 1 <= 4  # of the checkpoints at every second step, the newest may have been half written
    report(event.name, noticed=noticed, restarted=restarted, training_again=trained, steps_lost=reached - first + 1)
    if node not in nodes_of(cluster, job):
        cluster.wait_for_node(node, "idle")
        assert cluster.orphans([node]) == {}


def test_nothing_was_lost_or_repeated(cluster: Cluster, run: TinyRun, job: Job) -> None:
    """Compared with the run in one process."""
    assert job.wait() == "COMPLETED", job.output
    assert cluster.orphans() == {}
    ended = run.train(*words("undisturbed", 24))
    assert ended.exit_code == 0, ended.output
    expected, got = run.directory / "undisturbed", run.directory / "disturbed"
    assert [record["step"] for record in run.metrics("disturbed")] == list(range(1, STEPS + 1))
    assert samples(got) == samples(expected)
    assert_same_adapter(expected, got)


def test_a_cancelled_job_stays_cancelled_and_goes_on_with_fewer_nodes(cluster: Cluster, run: TinyRun) -> None:
    """When the user submits it again."""
    job = submit(cluster, run, "cancelled", "train.max_steps=6")
    job.wait_for("step 1/")
    job.cancel()
    assert job.wait() == "CANCELLED"
    assert "checkpoint written" in job.output
    assert cluster.orphans() == {}

    again = submit(cluster, run, "cancelled", "train.max_steps=6", "train.resume=auto", nodes=1)
    assert again.wait() == "COMPLETED", again.output
    assert "2 per device x 24 accumulation x 1 ranks" in again.output
    assert [record["step"] for record in run.metrics("cancelled")] == list(range(1, 7))
    assert (job.state, job.restarts) == ("CANCELLED", 0)


def output_of(job: Job, life: int) -> str:
    """What the job wrote in one of its lives, the first being 0."""
    return job.output.partition(f"life {life}:")[2].partition(f"life {life + 1}:")[0]


def steps_of(job: Job, life: int) -> list[int]:
    """Steps that were done in one of its lives."""
    return [int(number) for number in re.findall(rf"  step (\d+)/{STEPS}  epoch", output_of(job, life))]


def samples(output_dir: Path) -> dict[int, Sequence[LedgerSample]]:
    """What each step was trained on."""
    return {step: record.samples for step, record in read_ledger(output_dir).items()}


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


def assert_same_adapter(expected_dir: Path, got_dir: Path) -> None:
    expected, got = (load_file(d / "adapter" / "adapter_model.safetensors") for d in (expected_dir, got_dir))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def report(event: str, **figures: float) -> None:
    """A line for the table of docs, where CLUSTER_REPORT names a file; seconds since the event."""
    if path := os.environ.get("CLUSTER_REPORT"):
        with Path(path).open("a") as file:
            rounded = {name: round(value, 1) for name, value in figures.items()}
            file.write(json.dumps({"event": event, **rounded}) + "\n")
