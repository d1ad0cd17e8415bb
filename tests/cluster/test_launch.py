"""`vlm-dist launch` from one run file: over ssh to two nodes, and as a job of Slurm."""

from __future__ import annotations

import re

import pytest

from tests.cluster.cluster import Cluster, Job
from tests.tiny_run import TinyRun, make_tiny_run, wait_for_text

pytestmark = pytest.mark.cluster

STEPS = 3
#: A global batch of 4 on one process and on two.
OPTIONS = (f"train.max_steps={STEPS}", "data.eval=[]", "peft.lora_dropout=0")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("launch"))


@pytest.fixture(scope="module")
def alone(run: TinyRun) -> dict[int, float]:
    """Losses of the same run in one process."""
    ended = run.train(*OPTIONS, "train.gradient_accumulation_steps=2", "train.output_dir=alone")
    assert ended.exit_code == 0, ended.output
    return run.losses("alone")


class OverSsh:
    """`vlm-dist launch --hostfile`, under way.

    Args:
        cluster: on whose first node it is called.
        run: what is trained.
        output_dir: its output directory; its output goes to a file of that name.
        overrides: of the run.
    """

    def __init__(self, cluster: Cluster, run: TinyRun, output_dir: str, *overrides: str) -> None:
        hostfile = run.directory / "hosts"
        hostfile.write_text("".join(f"{node} slots=1\n" for node in cluster.nodes))
        command = ["vlm-dist", "launch", "configs/tiny.yaml", "--hostfile", "hosts"]
        for override in (*overrides, f"train.output_dir={output_dir}"):
            command += ["--set", override]
        self.log = run.directory / f"{output_dir}.log"
        self.process = cluster.begin(
            cluster.nodes[0], *command, cwd=run.directory, environ=run.environment(), output=self.log
        )
        self._cluster, self._run_name = cluster, output_dir

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Until its output has a text."""
        wait_for_text(self.log, text, self.process, seconds)

    def signal(self, name: str) -> None:
        """Send a signal to the command itself, as `kill` does."""
        pid = next(
            process.pid
            for process in self._cluster.processes(self._cluster.nodes[0], "vlm-dist launch")
            if self._run_name in process.command
        )
        assert self._cluster.on(self._cluster.nodes[0], "kill", f"-{name}", str(pid)).exit_code == 0

    def end(self, seconds: float = 120) -> int:
        """Its exit code."""
        return self.process.wait(seconds)


def test_two_runs_over_ssh_side_by_side_and_one_is_asked_to_stop(
    cluster: Cluster, run: TinyRun, alone: dict[int, float]
) -> None:
    """Same hosts, same user, same Python: each has a port of its own, and signals find their own ranks."""
    first = OverSsh(cluster, run, "first", *OPTIONS, "train.gradient_accumulation_steps=1")
    endless = OverSsh(cluster, run, "endless", "data.eval=[]", "train.max_steps=100000", "train.logging_steps=1")
    assert first.end() == 0, first.output
    assert run.losses("first") == pytest.approx(alone, rel=1e-5)

    endless.wait_for("  step 2/")
    endless.signal("TERM")
    assert endless.end() == 75, endless.output
    assert "SIGTERM" in endless.output
    assert list((run.directory / "endless").glob("checkpoint-*/COMPLETE"))
    assert cluster.orphans() == {}


def test_no_rank_outlives_a_launcher_that_is_killed(cluster: Cluster, run: TinyRun) -> None:
    endless = OverSsh(cluster, run, "killed", "data.eval=[]", "train.max_steps=100000")
    endless.wait_for("  step 2/")
    endless.signal("KILL")
    assert endless.end() != 0
    assert cluster.orphans(seconds=40) == {}
    assert list((run.directory / "killed").glob("checkpoint-*/COMPLETE"))  # the ranks were asked to stop


def test_a_job_of_slurm_from_the_run_file(cluster: Cluster, run: TinyRun, alone: dict[int, float]) -> None:
    sets = [word for override in (*OPTIONS, "train.output_dir=slurm") for word in ("--set", override)]
    submitted = cluster.login(
        *("vlm-dist", "launch", "configs/tiny.yaml", "--slurm", "--nodes", "2", "--gpus-per-node", "1"),
        *("--account", "students", "--partition", "test", "--time", "1:00:00", "--sbatch=--cpus-per-task=2"),
        *sets,
        *("--set", "train.gradient_accumulation_steps=1"),
        cwd=run.directory,
        environ=run.environment(),
    )
    number = re.search(r"Submitted batch job (\d+)", submitted.stdout)
    assert number, submitted.output
    job = Job(cluster, number[1])
    assert job.wait() == "COMPLETED", job.output
    assert run.losses("slurm") == pytest.approx(alone, rel=1e-5)
    assert cluster.orphans() == {}
