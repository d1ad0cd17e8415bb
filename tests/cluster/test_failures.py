"""What happens to a job of two nodes when nodes, network, daemons or ranks fail; a third node stands by."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.cluster import Cluster, Job
from tests.cluster.sbatch import edited_script
from tests.tiny_run import TinyRun, make_tiny_run
from vlm_dist.data.ledger import read_ledger

pytestmark = pytest.mark.cluster

NUM_NODES = 3
STEPS = 20
#: Of large steps, so that the job outlives what Slurm needs to notice a failure.
OPTIONS = {
    "data.eval": "[]",
    "peft.lora_dropout": "0",
    "train.max_steps": str(STEPS),
    "train.save_steps": "4",
    "train.sample_ledger": "true",
}


def words(output_dir: str, accumulation: int) -> list[str]:
    """Overrides of a run whose global batch is 32 on one or on two ranks."""
    overrides = OPTIONS | {
        "train.output_dir": output_dir,
        "train.gradient_accumulation_steps": str(accumulation),
    }
    return [f"{name}={value}" for name, value in overrides.items()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("failures"))


@pytest.fixture(scope="module")
def undisturbed(run: TinyRun) -> Path:
    """Output of the run in one process."""
    ended = run.train(*words("undisturbed", 16))
    assert ended.exit_code == 0, ended.output
    return run.directory / "undisturbed"


def kill_rank(cluster: Cluster, node: str) -> None:
    """The trainer of that node, as the kernel does when memory is short."""
    trainer = next(p for p in cluster.processes(node, "-m vlm_dist.train --config") if "launcher." not in p.command)
    assert cluster.on(node, "kill", "-KILL", str(trainer.pid)).exit_code == 0


def do(*before: str) -> Callable[[Cluster, str], None]:
    """A command of cluster.sh on a node."""

    def act(cluster: Cluster, node: str) -> None:
        for command in before:
            done = cluster.manage(command, node)
            assert done.exit_code == 0, done.output

    return act


@dataclass(frozen=True)
class Event:
    """Something that fails.

    Attributes:
        name: of the event.
        happens: to a node of the job.
        rank: whose node.
        mended: what makes the node whole again, once the job goes on elsewhere.
        why: what the job's log says of it; empty: it is Slurm who acts.
    """

    name: str
    happens: Callable[[Cluster, str], None]
    rank: int = 1
    mended: Callable[[Cluster, str], None] = do()
    why: str = ""


EVENTS = [
    Event("rank killed", kill_rank, why="rank 1 on {node} was killed by SIGKILL"),
    Event("node killed", do("kill"), rank=0, mended=do("up")),
    Event("node crashed silently", do("crash"), mended=do("up")),
    Event("network cut and healed", do("cut"), mended=do("heal")),
    Event("slurmd killed", do("kill-slurmd"), mended=do("start-slurmd")),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.name)
def test_the_job_goes_on_elsewhere_and_loses_nothing(
    event: Event, cluster: Cluster, run: TinyRun, undisturbed: Path
) -> None:
    name = event.name.replace(" ", "-")
    sets = [part for word in words(name, 8) for part in ("--set", word)]
    script = edited_script(run, ntasks_per_node=1, gpus_per_node=1)
    job = cluster.submit(script, *sets, cwd=run.directory, environ=run.environment())
    job.wait_for("checkpoint written")
    node = nodes_of(cluster, job)[event.rank]
    output = run.directory / name
    reached = len(run.losses(name))

    happened = time.monotonic()
    event.happens(cluster, node)
    figures: dict[str, float | str] = {"event": event.name}
    figures["noticed_seconds"] = seconds_until(lambda: job.state != "RUNNING", happened)
    figures["restarted_seconds"] = seconds_until(lambda: "life 1:" in job.output, happened)
    if event.mended is not EVENTS[0].mended:
        cluster.wait_for_node(node, "down")
    event.mended(cluster, node)
    figures["training_again_seconds"] = seconds_until(lambda: "step " in job.output.partition("life 1:")[2], happened)
    assert job.wait() == "COMPLETED", job.output
    figures["steps_at_event"] = reached

    assert job.restarts == 1
    assert event.why.format(node=node) in job.output
    assert [record["step"] for record in run.metrics(name)] == list(range(1, STEPS + 1))
    assert {s: r.samples for s, r in read_ledger(output).items()} == {
        s: r.samples for s, r in read_ledger(undisturbed).items()
    }
    assert_same_adapter(undisturbed, output)
    cluster.wait_for_node(node, "idle")
    assert cluster.orphans() == {}
    report(figures)


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, run: TinyRun) -> None:
    sets = [part for word in words("cancelled", 8) for part in ("--set", word)]
    script = edited_script(run, ntasks_per_node=1, gpus_per_node=1)
    job = cluster.submit(script, *sets, cwd=run.directory, environ=run.environment())
    job.wait_for("step 1/")
    job.cancel()
    assert job.wait() == "CANCELLED"
    time.sleep(8)  # longer than a requeued job needs to start
    assert (job.state, job.restarts) == ("CANCELLED", 0)
    assert "checkpoint written" in job.output
    assert cluster.orphans() == {}


def nodes_of(cluster: Cluster, job: Job) -> list[str]:
    """In the order of ranks."""
    return cluster.login("scontrol", "show", "hostnames", job.facts()["NodeList"]).stdout.split()


def seconds_until(is_so: Callable[[], bool], since: float, limit: float = 120) -> float:
    while not is_so():
        assert time.monotonic() - since < limit
        time.sleep(0.1)
    return round(time.monotonic() - since, 1)


def assert_same_adapter(expected_dir: Path, got_dir: Path) -> None:
    expected, got = (load_file(d / "adapter" / "adapter_model.safetensors") for d in (expected_dir, got_dir))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def report(figures: dict[str, float | str]) -> None:
    """A line for the table of docs, where CLUSTER_REPORT names a file."""
    if path := os.environ.get("CLUSTER_REPORT"):
        with Path(path).open("a") as file:
            file.write(json.dumps(figures) + "\n")
