"""What the user and Slurm do to a job: time limit, `scontrol requeue`, `scancel`, fewer nodes, more nodes."""

from __future__ import annotations

import time

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.disturbed import assert_undisturbed, output_of, report, steps_of, submit, wait_until
from tests.tiny_run import TinyRun, make_tiny_run

pytestmark = [pytest.mark.cluster, pytest.mark.long]

NUM_NODES = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("events"))


def test_requeued_cancelled_and_continued_on_fewer_nodes(cluster: Cluster, run: TinyRun) -> None:
    job = submit(cluster, run, "moved")
    wait_until(lambda: "checkpoint written" in output_of(job, 0), job)
    happened = time.monotonic()
    assert cluster.login("scontrol", "requeue", job.number).exit_code == 0
    noticed = wait_until(lambda: job.state != "RUNNING", job) - happened
    restarted = wait_until(lambda: "life 1:" in job.output, job) - happened
    trained = wait_until(lambda: steps_of(job, 1) != [], job) - happened
    lost = max(steps_of(job, 0)) - steps_of(job, 1)[0] + 1
    report("scontrol requeue", noticed=noticed, restarted=restarted, training_again=trained, steps_lost=lost)
    assert lost <= 0  # the ranks saved when they were asked to stop

    happened = time.monotonic()
    job.cancel()
    assert job.wait() == "CANCELLED"
    assert cluster.orphans() == {}
    noticed = time.monotonic() - happened
    reached = max(run.losses("moved"))
    again = submit(cluster, run, "moved", "train.resume=auto", nodes=1)
    trained = wait_until(lambda: steps_of(again, 0) != [], again) - happened
    lost = reached - steps_of(again, 0)[0] + 1
    report("scancel, then sbatch on one node", noticed=noticed, training_again=trained, steps_lost=lost)
    assert lost <= 0
    assert again.wait() == "COMPLETED", again.output
    assert "2 per device x 8 accumulation x 1 ranks" in again.output
    assert (job.state, job.restarts) == ("CANCELLED", 1)
    assert_undisturbed(run, "moved")
    assert cluster.orphans() == {}


def test_the_time_limit_is_near(cluster: Cluster, run: TinyRun) -> None:
    """The line of --signal as shipped, with less time: Slurm sends USR1 up to a minute earlier than it says."""
    job = submit(cluster, run, "limited", "train.max_steps=100000", time="0:02:00", signal="USR1@40")
    wait_until(lambda: "SIGUSR1" in job.output, job)
    happened = time.monotonic()
    noticed = wait_until(lambda: job.state != "RUNNING", job) - happened
    restarted = wait_until(lambda: "life 1:" in job.output, job) - happened
    trained = wait_until(lambda: "/100000  epoch" in output_of(job, 1), job) - happened
    report("time limit: USR1 before it", noticed=noticed, restarted=restarted, training_again=trained, steps_lost=0)
    assert "(preempted)" in output_of(job, 0) and "requeued (1 of at most 20)" in output_of(job, 0)
    job.cancel()
    assert job.wait() == "CANCELLED"
    assert cluster.orphans() == {}


@pytest.mark.parametrize("stage", [2, 3])
def test_four_nodes_train_as_one_process(stage: int, cluster: Cluster, run: TinyRun) -> None:
    overrides = (f"deepspeed=ds_configs/tiny{stage}.json", "train.max_steps=8")
    job = submit(cluster, run, f"four{stage}", *overrides, nodes=4)
    assert job.wait() == "COMPLETED", job.output
    assert "2 accumulation x 4 ranks" in job.output
    assert_undisturbed(run, f"four{stage}", *overrides)
    assert cluster.orphans() == {}
