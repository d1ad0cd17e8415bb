"""The three ways in of the README, word for word."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.e2e.preloaded import clean_environment
from tests.tiny_run import ROOT, Finished, TinyRun, make_tiny_run
from vlm_dist.distributed.group import free_port

pytestmark = pytest.mark.e2e

STEPS = 3
#: The same global batch of 4 on one process and on two, so that all ways must give the same losses.
ALONE = (f"train.max_steps={STEPS}", "data.eval=[]", "peft.lora_dropout=0", "train.gradient_accumulation_steps=2")
TOGETHER = (*ALONE[:-1], "train.gradient_accumulation_steps=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("ways"))


@pytest.fixture(scope="module")
def reference(run: TinyRun) -> dict[int, float]:
    """Losses of `python -m vlm_dist.train --config …`."""
    ended = run.train(*ALONE, "train.output_dir=plain")
    assert ended.exit_code == 0, ended.output
    losses = run.losses("plain")
    assert list(losses) == list(range(1, STEPS + 1))
    return losses


def sets(overrides: tuple[str, ...]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def assert_same(run: TinyRun, output_dir: str, ended: Finished, reference: dict[int, float]) -> None:
    assert ended.exit_code == 0, ended.output
    assert run.losses(output_dir) == pytest.approx(reference, rel=1e-5)
    assert (run.directory / output_dir / "adapter" / "adapter_model.safetensors").is_file()
    assert f"done: {STEPS} steps" in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.parametrize("flag", ["-m", "--module"])
def test_deepspeed(flag: str, run: TinyRun, reference: dict[int, float]) -> None:
    output_dir = f"deepspeed{flag}"
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), flag, "vlm_dist.train"]
    overrides = sets((*TOGETHER, f"train.output_dir={output_dir}"))
    ended = run.command(["env", *command, "--config", "configs/tiny.yaml", *overrides])
    assert_same(run, output_dir, ended, reference)
    assert ended.output.count(f"done: {STEPS} steps") == 1  # rank 0 speaks for both


def test_launch(run: TinyRun, reference: dict[int, float]) -> None:
    """The same by `vlm-dist launch`, which checks the run and chooses the command."""
    overrides = sets((*TOGETHER, "train.output_dir=launched"))
    ended = run.command(["vlm-dist", "launch", "configs/tiny.yaml", "--gpus-per-node", "2", *overrides])
    assert_same(run, "launched", ended, reference)
    assert "launch: 2 processes on this machine" in ended.stderr


FAKE_SCONTROL = "#!/bin/bash\necho localhost\n"
# Two tasks on one node at the same time, as Slurm sets them up.
FAKE_SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_TASKS_PER_NODE=2 SLURM_NODEID=0
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & other=$!
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" || exit $?
wait $other
"""


def test_sbatch(run: TinyRun, reference: dict[int, float], tmp_path: Path) -> None:
    """slurm/train.sbatch with a make-believe srun, down to a real training."""
    for name, text in (("scontrol", FAKE_SCONTROL), ("srun", FAKE_SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = clean_environment()
    environment |= {
        "PATH": f"{tmp_path}:{environment['PATH']}",
        "RUN_FILE": "configs/tiny.yaml",
        "SLURM_SUBMIT_DIR": str(run.directory),
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",  # the batch script has it too, but no step id
        "VIRTUAL_ENV": sys.prefix,
    }
    script = ["bash", str(ROOT / "slurm" / "train.sbatch"), *sets((*TOGETHER, "train.output_dir=slurm"))]
    ended = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert_same(run, "slurm", Finished(ended.returncode, ended.stdout, ended.stderr), reference)


def test_without_config_the_run_file_of_the_working_directory_is_used(run: TinyRun) -> None:
    """The shipped configs/run.yaml with its five files, pointed at another model and at the user's shards."""
    overrides = (
        "model_id=model",
        "data.train=[{type: tar, path: data/images, columns: {image: png}}]",
        "train.max_steps=2",
        "train.report_to=none",
        "train.output_dir=defaults",
    )
    ended = run.command([sys.executable, "-m", "vlm_dist.train", *sets(overrides)])
    assert ended.exit_code == 0, ended.output
    assert "global batch 16 = 8 per device x 2 accumulation x 1 ranks" in ended.output
    assert len(run.losses("defaults")) == 2
    resolved = yaml.safe_load((run.directory / "defaults" / "resolved_config.yaml").read_text())
    assert resolved["model_id"] == "model"
    assert resolved["train"]["per_device_train_batch_size"] == 8


def test_under_the_debugger(run: TinyRun, reference: dict[int, float]) -> None:
    command = [sys.executable, "-m", "pdb", "-c", "continue", "-m", "vlm_dist.train", "--config", "configs/tiny.yaml"]
    command += sets((*ALONE, "train.output_dir=debugged"))
    ended = subprocess.run(
        command, cwd=run.directory, env=clean_environment(), input="", capture_output=True, text=True, timeout=240
    )
    assert "The program exited via sys.exit(). Exit status: 0" in ended.stdout, ended.stdout + ended.stderr
    assert run.losses("debugged") == pytest.approx(reference, rel=1e-6)
