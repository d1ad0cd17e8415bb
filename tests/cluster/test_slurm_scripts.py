"""The scripts of slurm/ on a cluster of two nodes: logs of a job that fails, job arrays, allocations to work in."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, Job
from tests.cluster.sbatch import edited_script
from tests.tiny_run import ROOT, TinyRun, make_tiny_run

pytestmark = pytest.mark.cluster

#: What sbatch hands on where it is called by a job that is the fifth life of another array's task.
HANDED_ON = {"SLURM_ARRAY_JOB_ID": "999", "SLURM_ARRAY_TASK_ID": "7", "SLURM_RESTART_COUNT": "5"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("scripts"), num_images=256)


def sets(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def kill_rank(cluster: Cluster, node: str, local_rank: int) -> None:
    """The trainer itself, as the kernel does when memory is short."""
    for process in cluster.processes(node, "-m vlm_dist.train --config"):
        environ = cluster.on(node, "cat", f"/proc/{process.pid}/environ").stdout.split("\0")
        if f"SLURM_LOCALID={local_rank}" in environ and "launcher." not in process.command:
            assert cluster.on(node, "kill", "-KILL", str(process.pid)).exit_code == 0
            return
    raise AssertionError(cluster.processes(node, ""))


def test_the_log_of_a_job_tells_who_failed_first_and_an_older_job_of_that_id_is_not_believed(
    cluster: Cluster, run: TinyRun
) -> None:
    script = edited_script(run)
    environ = run.environment() | {"MAX_REQUEUES": "0"} | HANDED_ON
    arguments = sets("data.eval=[]", "train.max_steps=100000", "train.logging_steps=1", "train.output_dir=killed")
    held = cluster.login("sbatch", "--hold", str(script), *arguments, cwd=run.directory, environ=environ)
    job = Job(cluster, held.stdout.split()[-1])
    place = run.directory / f"slurm-vlm-dist-{job.number}"
    (place / "life-0").mkdir(parents=True)  # before Slurm's ids began anew; its rank 0 had a wrong configuration
    (place / "life-0" / "rank-00000.json").write_text('{"code": 2, "at": 1.0, "node": "old"}')
    (place / "failed-at-step").write_text("7")
    assert cluster.login("scontrol", "release", job.number).exit_code == 0
    job.wait_for("  step 2/")
    kill_rank(cluster, cluster.nodes[1], 1)
    assert job.wait() == "FAILED"
    assert f"rank 3 on {cluster.nodes[1]} left no error; the last that it said:" in job.output
    assert f"rank 3 on {cluster.nodes[1]} was killed by SIGKILL" in job.output
    assert f"{place}/life-0/rank-*.log (4)" in job.output
    logs = [path.read_text() for path in sorted((place / "life-0").glob("rank-*.log"))]
    assert [re.findall(r"^rank (\d) on (\S+),", log) for log in logs] == [
        [(str(rank), cluster.nodes[rank // 2])] for rank in range(4)
    ]
    assert "  step 2/" in logs[0]
    assert list(run.directory.glob(f"{place.name}.old-*/life-0/rank-00000.json"))  # put aside, not lost
    assert cluster.orphans() == {}


def test_each_task_of_an_array_is_a_run_and_is_requeued_alone(cluster: Cluster, run: TinyRun) -> None:
    """The second one: its own job id is that of the whole array, too."""
    edited_script(run)
    script = edited_script(run, "train_array.sbatch", nodes=1, gpus_per_node=1, ntasks_per_node=1, array="1-2%2")
    steps = "train.max_steps=12 train.logging_steps=1 data.eval=[]"
    (run.directory / "configs" / "sweep.txt").write_text(
        f"# two rates\nconfigs/tiny.yaml {steps} train.learning_rate=1e-4\n\n"
        f"{steps} train.learning_rate=2e-4 train.output_dir='runs/the second'\n"
    )
    array = cluster.submit(script, cwd=run.directory, environ=run.environment() | HANDED_ON)
    first, second = (Job(cluster, f"{array.number}_{task}") for task in (1, 2))
    second.wait_for("  step 2/")
    second.cancel("--signal=USR1")
    assert (first.wait(), second.wait()) == ("COMPLETED", "COMPLETED"), first.output + second.output
    assert (first.restarts, second.restarts) == (0, 1)
    assert f"job {array.number}_1, life 0:" in first.output
    assert f"job {array.number}_2, life 1:" in second.output
    rates = [
        {record["learning_rate"] for record in run.metrics(output)} for output in ("runs/sweep/1", "runs/the second")
    ]
    assert max(rates[1]) == pytest.approx(2 * max(rates[0]))
    assert all(set(run.losses(output)) == set(range(1, 13)) for output in ("runs/sweep/1", "runs/the second"))
    ports = [re.findall(r"meeting at \S+:(\d+)", job.output)[0] for job in (first, second)]
    assert ports[0] != ports[1]
    assert cluster.orphans() == {}


def test_each_node_has_copies_of_its_own_shards(cluster: Cluster, run: TinyRun) -> None:
    """A pass is cut between the nodes in the middle of a shard, and begins in the middle of one."""
    script = edited_script(run, ntasks_per_node=1, gpus_per_node=1)
    local = "/dev/shm/vlm-dist-stage"  # each node has its own
    cache = f"{{dir: {local}, stage_files: true, mode: whole}}"
    overrides = sets(
        *("data.train=[{type: tar, path: data/images}]", "data.eval=[]", f"data.cache={cache}"),
        *("train.balance_scope=node", "train.max_steps=-1", "train.num_train_epochs=1"),
        *("train.gradient_accumulation_steps=8", "train.group_by_length=false", "train.output_dir=staged"),
    )
    job = cluster.submit(script, *overrides, cwd=run.directory, environ=run.environment())
    assert job.wait() == "COMPLETED", job.output
    shards = {path.name for path in (run.directory / "data" / "images").glob("*.tar")}
    first, second = (
        {name.partition("-")[2] for name in cluster.on(node, "ls", local).stdout.split() if name.endswith(".tar")}
        for node in cluster.nodes
    )
    assert first | second == shards and len(shards) == 16
    assert len(first) <= 9 and len(second) <= 9
    assert cluster.orphans() == {}


def test_a_run_inside_an_allocation(cluster: Cluster, run: TinyRun) -> None:
    edited_script(run)
    script = Path(shutil.copy(ROOT / "slurm" / "interactive.sh", run.directory / "slurm"))
    words = ["--nodes", "2", "--gpus=1", "--cpus", "2", "--time", "0:10:00", "configs/tiny.yaml"]
    overrides = sets("data.eval=[]", "train.max_steps=2", "train.output_dir=allocated")
    ended = cluster.login(
        "bash", str(script), *words, *overrides, cwd=run.directory, environ=run.environment(), timeout_seconds=240
    )
    assert ended.exit_code == 0, ended.output
    assert "Granted job allocation" in ended.output
    assert " x 2 ranks" in ended.output
    assert set(run.losses("allocated")) == {1, 2}
    assert cluster.orphans() == {}
