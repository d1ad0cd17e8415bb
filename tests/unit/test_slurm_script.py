"""slurm/train.sbatch with a make-believe srun: its command line and environment as far as each rank's place."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.requeue import read_end
from launcher.slurm_rank import write_end

PROJECT = Path(__file__).resolve().parents[2]
SCRIPT = PROJECT / "slurm" / "train.sbatch"

FAKE_SCONTROL = """#!/bin/bash
[[ $1 == requeue ]] && { echo "$2" >"$PROBE/requeued"; exit; }
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
# Takes the place of the ranks' Python: prints where the rank finds itself.
FAKE_PYTHON = """#!/bin/bash
[[ "$1 $2" == "-m launcher.requeue" ]] && exec "$REAL_PYTHON" "$@"
[[ "$1 $2 $3 $4" == "-m launcher.slurm_rank -m vlm_dist.train" ]] || exit 64
shift 2
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


def test_a_preempted_job_is_requeued_and_goes_on_from_its_checkpoint(submit, tmp_path):
    first = submit(PROBE_EXIT="75")
    assert first.returncode == 75
    assert "requeued (1 of at most 20)" in first.stderr
    assert (tmp_path / "requeued").read_text() == "12345678\n"
    second = submit(SLURM_RESTART_COUNT="1")
    assert second.returncode == 0, second.stderr
    ranks = [json.loads(line) for line in (tmp_path / "ranks").read_text().splitlines()]
    assert "train.resume=auto" not in ranks[0]["argv"]
    assert all(rank["argv"][-2:] == ["--set", "train.resume=auto"] for rank in ranks[-4:])
    assert not list((tmp_path / "project").glob("slurm-*"))  # nothing is left of a run that is done


@pytest.mark.parametrize(
    ("code", "environ", "why"),
    [
        ("2", {}, "(config) at start-up; another start would end there again"),
        ("75", {"SLURM_RESTART_COUNT": "3", "MAX_REQUEUES": "3"}, "requeued 3 times already (MAX_REQUEUES=3)"),
    ],
)
def test_what_another_start_would_repeat_is_not_requeued(code, environ, why, submit, tmp_path):
    done = submit(PROBE_EXIT=code, **environ)
    assert done.returncode == int(code)
    assert why in done.stderr
    assert not (tmp_path / "requeued").exists()


def test_a_failure_is_tried_once_more_at_the_same_step(submit, tmp_path):
    assert submit(PROBE_EXIT="6").returncode == 6
    assert (tmp_path / "requeued").exists()
    (tmp_path / "requeued").unlink()
    again = submit(PROBE_EXIT="6", SLURM_RESTART_COUNT="1")
    assert "failed there twice" in again.stderr
    assert not (tmp_path / "requeued").exists()


def test_the_first_rank_that_failed_decides_not_those_that_were_ended_for_it(tmp_path):
    write_end(tmp_path, 0, 75)
    write_end(tmp_path, 3, 2)
    assert read_end(tmp_path, 75).rank == 3
    assert read_end(tmp_path, 75).exit_code == 2
    (tmp_path / "rank-00003.json").unlink()
    write_end(tmp_path, 1, -9)
    assert read_end(tmp_path, 137).code == 75  # it was preempted before another one was killed
    (tmp_path / "rank-00000.json").unlink()
    assert str(read_end(tmp_path, 137)).startswith("rank 1 on ")
    assert "was killed by SIGKILL" in str(read_end(tmp_path, 137))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_trainer_listens_is_not_lost_and_kills_nobody(number, tmp_path):
    """The trainer, here a script that listens late, gets it when it does."""
    script = (
        "import os, signal, sys, time\n"
        "print('started', flush=True); time.sleep(1)\n"
        "heard = []\n"
        "for n in (signal.SIGTERM, signal.SIGUSR1): signal.signal(n, lambda n, f: heard.append(n))\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGUSR1]); time.sleep(0.1)\n"
        "sys.exit(75 if heard else 1)\n"
    )
    environ = os.environ | {"SLURM_PROCID": "1", "VLM_DIST_LIFE_DIRECTORY": str(tmp_path)}
    command = [sys.executable, "-m", "launcher.slurm_rank", "-c", script]
    rank = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, start_new_session=True, cwd=PROJECT)
    assert rank.stdout.readline() == b"started\n"
    os.killpg(rank.pid, number)  # as Slurm does: every process of the task
    assert rank.wait(20) == 75
    assert read_end(tmp_path, 75).code == 75


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
