"""`launcher.elastic` on two nodes, each with its own: a rank is killed, both start again and meet."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.disturbed import find_trainer
from tests.tiny_run import TinyRun, make_tiny_run, wait_for_text

pytestmark = pytest.mark.cluster

STEPS = 12
OPTIONS = (f"train.max_steps={STEPS}", "train.save_steps=2", "data.eval=[]", "peft.lora_dropout=0")
PORT = 15431


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("elastic"))


def test_a_killed_rank_is_restarted_with_its_peer_on_the_other_node(cluster: Cluster, run: TinyRun) -> None:
    alone = run.train(*OPTIONS, "train.gradient_accumulation_steps=4", "train.output_dir=alone")
    assert alone.exit_code == 0, alone.output
    command = ["python", "-m", "launcher.elastic", "--nnodes", "2", "--nproc_per_node", "1", "--max_restarts", "2"]
    command += ["--rdzv_backend", "c10d", "--rdzv_id", "run", "--rdzv_endpoint", f"{cluster.nodes[0]}:{PORT}"]
    command += ["-m", "vlm_dist.train", "--config", "configs/tiny.yaml"]
    for override in (*OPTIONS, "train.gradient_accumulation_steps=2", "train.output_dir=elastic"):
        command += ["--set", override]
    logs = [run.directory / f"{node}.log" for node in cluster.nodes]
    started = [
        cluster.begin(node, *command, cwd=run.directory, environ=run.environment(), output=log)
        for node, log in zip(cluster.nodes, logs, strict=True)
    ]
    wait_for_text(logs[0], "checkpoint-4 is", started[0])
    victim = find_trainer(cluster, cluster.nodes[1])
    assert cluster.on(cluster.nodes[1], "kill", "-KILL", str(victim.pid)).exit_code == 0

    codes = [process.wait(240) for process in started]
    said = [Path(log).read_text() for log in logs]
    assert codes == [0, 0], "\n".join(said)
    assert "rank 1 was killed by SIGKILL" in said[1] and "restart 1 of 2" in said[1]
    assert "restart 1 of 2" in said[0]
    assert run.losses("elastic") == pytest.approx(run.losses("alone"), rel=1e-4)
    assert cluster.orphans() == {}
