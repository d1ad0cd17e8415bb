"""slurm/train.sbatch on a Slurm cluster of two nodes: sbatch, as shipped, with its marked lines edited."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.cluster import Cluster
from tests.cluster.sbatch import edited_script
from tests.tiny_run import TinyRun, make_tiny_run

pytestmark = pytest.mark.cluster

STEPS = 16
#: A global batch of 8, whatever the number of ranks.
BATCH = {1: 4, 2: 2, 4: 1}


def options(output_dir: str, *, stage: int, ranks: int, **train: str) -> list[str]:
    """What follows the script's name."""
    overrides = {
        "deepspeed": f"ds_configs/tiny{stage}.json",
        "data.eval": "[]",
        "peft.lora_dropout": "0",
        "train.max_steps": str(STEPS),
        "train.gradient_accumulation_steps": str(BATCH[ranks]),
        "train.output_dir": output_dir,
    } | {f"train.{name}": value for name, value in train.items()}
    return [word for name, value in overrides.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def alone(run: TinyRun) -> Path:
    """Output of the same run in one process."""
    ended = run.train(*options("alone", stage=2, ranks=1)[1::2])
    assert ended.exit_code == 0, ended.output
    return run.directory / "alone"


def assert_same_run(run: TinyRun, output_dir: str, alone: Path) -> None:
    """Every step once, with the same loss, and the same adapter in the end."""
    records = run.metrics(output_dir)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert run.losses(output_dir) == pytest.approx(run.losses(alone.name), rel=1e-4)
    expected, got = (
        load_file(directory / "adapter" / "adapter_model.safetensors")
        for directory in (alone, alone.parent / output_dir)
    )
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_two_nodes_train_as_one_process(cluster: Cluster, run: TinyRun, alone: Path) -> None:
    script = edited_script(run)
    job = cluster.submit(script, *options("zero2", stage=2, ranks=4), cwd=run.directory, environ=run.environment())
    assert job.wait() == "COMPLETED", job.output
    assert "2 per device x 1 accumulation x 4 ranks" in job.output
    assert "Traceback" not in job.output
    assert_same_run(run, "zero2", alone)
    assert cluster.orphans() == {}


def test_signal_checkpoint_requeue_and_the_end_is_the_same(cluster: Cluster, run: TinyRun, alone: Path) -> None:
    """ZeRO-3. The signal goes to the ranks, as that of `#SBATCH --signal=USR1@600` does."""
    script = edited_script(run, ntasks_per_node=1)
    environ = run.environment() | {"WANDB_MODE": "offline"}
    arguments = options("zero3", stage=3, ranks=2, report_to="wandb")
    job = cluster.submit(script, *arguments, cwd=run.directory, environ=environ)
    job.wait_for(f"step 2/{STEPS}")
    job.cancel("--signal=USR1")
    assert job.wait() == "COMPLETED", job.output
    assert job.restarts == 1
    assert "(preempted)" in job.output and "requeued (1 of at most 20)" in job.output
    assert f"done: {STEPS} steps" in job.output.partition("life 1")[2]
    assert_same_run(run, "zero3", alone)
    number = json.loads((run.directory / "zero3" / "wandb_run.json").read_text())["id"]
    recorded = sorted(path.name for path in (run.directory / "zero3" / "wandb").glob("offline-run-*"))
    assert len(recorded) == 2 and all(name.endswith(f"-{number}") for name in recorded)  # one run, in two parts
    assert cluster.orphans() == {}


def test_a_configuration_error_is_never_requeued(cluster: Cluster, run: TinyRun) -> None:
    script = edited_script(run)
    job = cluster.submit(
        script, "--set", "train.max_stepz=3", cwd=run.directory, environ=run.environment()
    )  # fmt: skip
    assert job.wait() == "FAILED"
    assert job.facts()["ExitCode"] == "2:0"
    assert job.restarts == 0
    assert job.output.count("did you mean max_steps") == 1
    assert "(config)" in job.output and "another start would end there again" in job.output
    assert cluster.orphans() == {}
