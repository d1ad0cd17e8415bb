"""slurm/train.sbatch with a make-believe srun: its command line and environment as far as each rank's place."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
SCRIPT = PROJECT / "slurm" / "train.sbatch"

FAKE_SCONTROL = """#!/bin/bash
[[ $* == "show hostnames gpu[07-08]" ]] || exit 1
printf 'gpu07\\ngpu08\\n'
"""
# Runs the tasks one after the other, as Slurm would set them up on two nodes with two tasks each.
FAKE_SRUN = """#!/bin/bash
printf '%s\\n' "$*" > "$PROBE/srun_arguments"
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_TASKS_PER_NODE="2(x2)"
for task in 0 1 2 3; do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NODEID=$((task / 2)) "$@" || exit $?
done
"""
# Takes the place of `python -m vlm_dist.train`: prints where the rank finds itself.
FAKE_PYTHON = """#!/bin/bash
[[ "$1 $2" == "-m vlm_dist.train" ]] || exit 64
exec "$REAL_PYTHON" - "$@" <<'PROBE_END'
import dataclasses, json, os, sys
from vlm_dist.distributed.environment import resolve_topology
found = dataclasses.asdict(resolve_topology(os.environ))
found |= {"argv": sys.argv[3:], **{name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")}}
with open(os.environ["PROBE"] + "/ranks", "a") as ranks:
    print(json.dumps(found), file=ranks)
sys.exit(int(os.environ.get("PROBE_EXIT", "0")))
PROBE_END
"""


@pytest.fixture
def submit(tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"scontrol": FAKE_SCONTROL, "srun": FAKE_SRUN, "python": FAKE_PYTHON}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    directory = tmp_path / "project"
    (directory / "configs").mkdir(parents=True)
    (directory / "configs" / "run.yaml").write_text("model: x\n")

    def run(*arguments, **environ):
        base = {
            "PATH": f"{commands}:/usr/bin:/bin", "PYTHONPATH": str(PROJECT), "REAL_PYTHON": sys.executable,
            "PROBE": str(tmp_path), "SLURM_SUBMIT_DIR": str(directory), "SLURM_JOB_ID": "12345678",
            "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0", "SLURM_CPUS_PER_TASK": "6",
        }  # fmt: skip
        # from a spool directory, as slurmd does it
        spooled = tmp_path / "slurm_script"
        shutil.copy(SCRIPT, spooled)
        return subprocess.run(
            ["bash", str(spooled), *arguments], env=base | environ, cwd="/", capture_output=True, text=True, timeout=60
        )

    return run


def test_every_task_finds_its_place_and_the_same_meeting_point(submit, tmp_path):
    done = submit("--set", "train.learning_rate=1e-4", RANK="0", WORLD_SIZE="1")  # left over in the submitting shell
    assert done.returncode == 0, done.stderr
    ranks = [json.loads(line) for line in (tmp_path / "ranks").read_text().splitlines()]
    assert [rank["rank"] for rank in ranks] == [0, 1, 2, 3]
    assert [rank["local_rank"] for rank in ranks] == [0, 1, 0, 1]
    assert {(r["world_size"], r["local_world_size"], r["launcher"]) for r in ranks} == {(4, 2, "slurm")}
    assert {(rank["MASTER_ADDR"], rank["MASTER_PORT"]) for rank in ranks} == {("gpu07", str(15000 + 12345678 % 15000))}
    assert ranks[0]["argv"] == ["--config", "configs/run.yaml", "--set", "train.learning_rate=1e-4"]
    options = (tmp_path / "srun_arguments").read_text()
    for option in ("--kill-on-bad-exit=1", "--export=ALL", "--cpus-per-task=6"):
        assert option in options


def test_the_exit_code_is_the_ranks(submit):
    assert submit(PROBE_EXIT="75").returncode == 75


def test_a_missing_run_file_is_named_before_anything_starts(submit, tmp_path):
    done = submit(RUN_FILE="configs/typo.yaml")
    assert done.returncode == 2
    assert "configs/typo.yaml" in done.stderr
    assert not (tmp_path / "ranks").exists()


def test_four_lines_are_to_be_edited():
    marked = [
        line
        for line in SCRIPT.read_text().splitlines()
        if "# " in line and line.split("# ")[-1][:2] in ("1.", "2.", "3.", "4.")
    ]
    assert [name in line for name, line in zip(("account", "partition", "nodes", "RUN_FILE"), marked, strict=True)] == [
        True
    ] * 4


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_is_content():
    subprocess.run(["shellcheck", str(SCRIPT)], check=True, env=os.environ)
