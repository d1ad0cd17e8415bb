"""`deepspeed --hostfile` over ssh between two nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.tiny_run import Finished, TinyRun, make_tiny_run

pytestmark = pytest.mark.cluster

STEPS = 3
#: A global batch of 4 on one process and on two.
OPTIONS = (f"train.max_steps={STEPS}", "data.eval=[]", "peft.lora_dropout=0")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("ssh"))


def train(cluster: Cluster, run: TinyRun, *overrides: str) -> Finished:
    """On both nodes with one process each, started in the first as a user does."""
    hostfile = run.directory / "hostfile"
    hostfile.write_text("".join(f"{node} slots=1\n" for node in cluster.nodes))
    command = ["deepspeed", "--hostfile", "hostfile", "-m", "vlm_dist.train", "--config", "configs/tiny.yaml"]
    for override in overrides:
        command += ["--set", override]
    return cluster.on(cluster.nodes[0], *command, cwd=run.directory, environ=run.environment(), timeout_seconds=200)


def test_two_nodes_train_as_one_process(cluster: Cluster, run: TinyRun) -> None:
    alone = run.train(*OPTIONS, "train.gradient_accumulation_steps=2", "train.output_dir=alone")
    assert alone.exit_code == 0, alone.output
    ended = train(cluster, run, *OPTIONS, "train.gradient_accumulation_steps=1", "train.output_dir=ssh")
    assert ended.exit_code == 0, ended.output
    assert ended.output.count(f"done: {STEPS} steps") == 1
    assert list(run.losses("ssh")) == list(range(1, STEPS + 1))
    assert run.losses("ssh") == pytest.approx(run.losses("alone"), rel=1e-5)
    assert Path(run.directory / "ssh" / "adapter" / "adapter_model.safetensors").is_file()
    assert cluster.orphans() == {}


def test_an_error_is_told_and_ends_both_nodes(cluster: Cluster, run: TinyRun) -> None:
    ended = train(cluster, run, "train.max_stepz=3")
    assert ended.exit_code == 2, ended.output
    # nobody ends the other node's rank, as a launcher does on one machine: after ten seconds it speaks for itself
    assert ended.output.count("error: --set train.max_stepz=3") == 1, ended.output
    assert cluster.orphans() == {}
