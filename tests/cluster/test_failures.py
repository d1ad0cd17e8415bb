"""A job of two nodes whose nodes, network, daemons and ranks fail, one after the other; a third node stands by."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.cluster.cluster import Cluster, Job
from tests.cluster.disturbed import (
    assert_undisturbed,
    find_trainer,
    first_step_after,
    nodes_of,
    output_of,
    report,
    submit,
    wait_until,
)
from tests.tiny_run import TinyRun, make_tiny_run

pytestmark = [pytest.mark.cluster, pytest.mark.long]

NUM_NODES = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("failures"))


@pytest.fixture(scope="module")
def job(cluster: Cluster, run: TinyRun) -> Iterator[Job]:
    """One job for all failures, each in a life of its own."""
    submitted = submit(cluster, run, "disturbed")
    yield submitted
    submitted.cancel()


def kill_rank(cluster: Cluster, node: str) -> None:
    """The trainer of that node, as the kernel does when memory is short."""
    assert cluster.on(node, "kill", "-KILL", str(find_trainer(cluster, node).pid)).exit_code == 0


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
    trained = wait_until(lambda: first_step_after(job, life) is not None, job) - happened
    first = first_step_after(job, life)
    assert first is not None

    assert event.why.format(node=node) in output_of(job, life)
    assert reached - first + 1 <= 4  # of the checkpoints at every second step, the newest may have been half written
    report(
        event.name, noticed=noticed, restarted=restarted, training_again=trained, steps_lost=max(0, reached - first + 1)
    )
    if node not in nodes_of(cluster, job):
        cluster.wait_for_node(node, "idle")
        assert cluster.orphans([node]) == {}


def test_nothing_was_lost_or_repeated(cluster: Cluster, run: TinyRun, job: Job) -> None:
    """Compared with the run in one process."""
    assert job.wait() == "COMPLETED", job.output
    assert cluster.orphans() == {}
    assert_undisturbed(run, "disturbed")
