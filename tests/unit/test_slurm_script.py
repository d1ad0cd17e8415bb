"""The scripts of slurm/ with a make-believe srun: its command line and environment as far as each rank's place."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher.requeue import read_end
from launcher.slurm_rank import write_end

PROJECT = Path(__file__).resolve().parents[2]
SCRIPT = PROJECT / "slurm" / "train.sbatch"

FAKE_SCONTROL = """#!/bin/bash
[[ $1 == requeue ]] && { echo "$2" >"$PROBE/requeued"; exit; }
[[ $* == "-o show job 12345678" ]] && exec cat "$PROBE/shown"
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
[[ "$1 $2" == "-m launcher.slurm_job" ]] && exec "$REAL_PYTHON" "$@"
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

    (directory / "slurm").mkdir()
    shutil.copy(SCRIPT, directory / "slurm")

    def run(*arguments, script=SCRIPT, **environ):
        base = {
            "PATH": f"{commands}:/usr/bin:/bin", "PYTHONPATH": str(PROJECT), "REAL_PYTHON": sys.executable,
            "PROBE": str(tmp_path), "SLURM_SUBMIT_DIR": str(directory), "SLURM_JOB_ID": "12345678",
            "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0", "SLURM_CPUS_PER_TASK": "6",
        }  # fmt: skip
        # from a spool directory, as slurmd does it
        spooled = tmp_path / "slurm_script"
        shutil.copy(script, spooled)
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
    assert submit(KEEP_LOGS="1").returncode == 0
    assert list((tmp_path / "project").glob("slurm-*/life-0"))


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


def test_a_limit_of_requeues_that_is_no_number_is_told_before_anything_starts(submit, tmp_path):
    done = submit(MAX_REQUEUES="-1")
    assert done.returncode == 2
    assert done.stderr == "error: MAX_REQUEUES=-1: expected a whole number from 0 on\n"


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
    environ = os.environ | {"SLURM_PROCID": "0", "VLM_DIST_LIFE_DIRECTORY": str(tmp_path)}
    command = [sys.executable, "-m", "launcher.slurm_rank", "-c", script]
    rank = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, start_new_session=True, cwd=PROJECT)
    assert rank.stdout.readline() == b"started\n"
    os.killpg(rank.pid, number)  # as Slurm does: every process of the task
    assert rank.wait(20) == 75
    assert read_end(tmp_path, 75).code == 75


@pytest.mark.parametrize(
    ("name", "is_for_all", "is_requeued"),
    [("TERM", True, False), ("USR1", False, True)],
    ids=["Slurm ends the job", "--signal=B:USR1, to the batch script alone"],
)
def test_a_signal_to_the_job(name, is_for_all, is_requeued, submit, tmp_path):
    """The ranks save and leave; after a TERM it is Slurm who decides what comes next."""
    (tmp_path / "bin" / "srun").write_text(
        "#!/bin/bash\ntrap 'exit 75' TERM USR1\ntouch $PROBE/started\nfor _ in {1..300}; do sleep 0.1; done\n"
    )
    with ThreadPoolExecutor(1) as thread:
        ending = thread.submit(submit)
        deadline = time.monotonic() + 30
        while not (tmp_path / "started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes()
                is_ours = f"PROBE={tmp_path}\0".encode() in (folder / "environ").read_bytes()
                if is_ours and (b"launcher.slurm_job" in words or (is_for_all and b"bin/srun" in words)):
                    os.kill(int(folder.name), getattr(signal, f"SIG{name}"))
        done = ending.result(40)
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "requeued").exists() == is_requeued


def test_a_missing_run_file_is_named_before_anything_starts(submit, tmp_path):
    done = submit(RUN_FILE="configs/typo.yaml")
    assert done.returncode == 2
    assert "configs/typo.yaml" in done.stderr
    assert not (tmp_path / "ranks").exists()


def probe_command(tmp_path, name, text):
    """A command that is found by the script, and writes its arguments to a file of its name."""
    path = tmp_path / "bin" / name
    path.write_text(f'#!/bin/bash\nprintf \'%s\\n\' "$@" >"$PROBE/{name}_arguments"\n{text}\n')
    path.chmod(0o755)


def test_a_task_of_an_array_trains_its_line_of_the_list(submit, tmp_path):
    project = tmp_path / "project"
    (project / "configs" / "other.yaml").write_text("model: x\n")
    (project / "configs" / "sweep.txt").write_text("train.learning_rate=1e-4\nconfigs/other.yaml peft.r=8\n")
    task = {"SLURM_ARRAY_JOB_ID": "12345678", "SLURM_ARRAY_TASK_ID": "2"}
    array = PROJECT / "slurm" / "train_array.sbatch"
    done = submit("--set", "train.max_steps=3", script=array, **task)
    assert done.returncode == 0, done.stderr
    (project / "configs" / "sweep.txt").write_text("train.learning_rate=1e-4\n")
    assert "submit with --array=1-1" in submit(script=array, **task).stderr
    rank = json.loads((tmp_path / "ranks").read_text().splitlines()[0])
    expected = ["train.max_steps=3", "peft.r=8", "train.output_dir=runs/sweep/2"]
    assert rank["argv"] == ["--config", "configs/other.yaml", *(w for one in expected for w in ("--set", one))]
    (project / "configs" / "sweep.txt").write_text("train.learning_rate=1e-4\npeft.r=8\n")
    assert submit(script=array, PROBE_EXIT="75", **task).returncode == 75
    assert (tmp_path / "requeued").read_text() == "12345678_2\n"  # the bare number would be all tasks
    (project / "configs" / "sweep.txt").write_text("peft.r=1\npeft.r=2\n")  # edited for the next array
    assert submit(script=array, SLURM_RESTART_COUNT="1", **task).returncode == 0
    rank = json.loads((tmp_path / "ranks").read_text().splitlines()[-1])
    expected = ["peft.r=8", "train.output_dir=runs/sweep/2", "train.resume=auto"]
    assert rank["argv"][2:] == [w for one in expected for w in ("--set", one)]


def test_variables_of_the_job_that_has_submitted_this_one_are_not_its_own(submit, tmp_path):
    """sbatch was called by the last life of a task of an array."""
    line = "JobId=12345678 {}JobName=next UserId=me(1) Requeue=1 Restarts={} BatchFlag=1"
    handed_on = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "20"}
    (tmp_path / "shown").write_text(line.format("", 0) + "\n")
    done = submit(PROBE_EXIT="75", **handed_on)
    assert "job 12345678, life 0:" in done.stdout
    assert (tmp_path / "requeued").read_text() == "12345678\n"
    own = "JobId=18 ArrayJobId=12345678 ArrayTaskId=4 JobName=next Restarts=9 BatchFlag=1\n"  # another task
    own += line.format("ArrayJobId=12345678 ArrayTaskId=3 ArrayTaskThrottle=2 ", 1) + "\n"
    (tmp_path / "shown").write_text(own)
    done = submit(**handed_on | {"SLURM_ARRAY_JOB_ID": "12345678"})
    assert "job 12345678_3, life 1:" in done.stdout


def test_modules_are_loaded_and_ranks_run_in_the_image(submit, tmp_path):
    probe_command(tmp_path, "module", "")
    probe_command(tmp_path, "apptainer", 'while [[ $1 != *.sif ]]; do shift; done; shift; exec "$@"')
    image = tmp_path / "train.sif"
    image.touch()
    done = submit(
        MODULES="cuda/12.4 python/3.11",
        CONTAINER=str(image),
        CONTAINER_MOUNTS="/data,/from:/to:ro",
        CONTAINER_OPTIONS="--rocm --env 'A=b c'",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "module_arguments").read_text().split() == ["load", "cuda/12.4", "python/3.11"]
    project = str(tmp_path / "project")
    words = ["exec", "--pwd", project, "--bind", project, "--bind", "/data", "--bind", "/from:/to:ro",
             "--rocm", "--env", "A=b c", str(image), "python", "-m", "launcher.slurm_rank"]  # fmt: skip
    assert (tmp_path / "apptainer_arguments").read_text().splitlines()[: len(words)] == words
    assert len((tmp_path / "ranks").read_text().splitlines()) == 4


def test_a_module_or_an_image_that_is_not_there_starts_nothing(submit, tmp_path):
    probe_command(tmp_path, "module", "exit 1")
    done = submit(MODULES="cuda/12.4")
    assert done.returncode == 2 and "module load cuda/12.4 failed" in done.stderr
    done = submit(CONTAINER="/images/none.sif", PYXIS_IMAGE="other")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1 and "one kind of container at a time" in done.stderr
    assert not (tmp_path / "ranks").exists() and not (tmp_path / "requeued").exists()


SALLOC = [
    "--job-name=vlm-dist-interactive", "--nodes=2", "--gpus-per-node=4", "--ntasks-per-node=4", "--cpus-per-task=8",
]  # fmt: skip


def interactive(tmp_path, *arguments, **environ):
    """Run slurm/interactive.sh of a project whose train.sbatch has its account edited."""
    folder = tmp_path / "slurm"
    folder.mkdir(exist_ok=True)
    (folder / "train.sbatch").write_text(SCRIPT.read_text().replace("my-account", "vision"))
    script = shutil.copy(PROJECT / "slurm" / "interactive.sh", folder)
    base = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "PROBE": str(tmp_path)}
    return subprocess.run(
        ["bash", script, *arguments], env=base | environ, cwd=tmp_path, capture_output=True, text=True
    )


def test_an_allocation_to_work_in(submit, tmp_path):
    probe_command(tmp_path, "salloc", "")
    asked = tmp_path / "salloc_arguments"
    probe_command(tmp_path, "vlm-dist", "")
    (tmp_path / "run.yaml").touch()
    done = interactive(tmp_path, "--nodes", "2", "--gpus=4", "--constraint=a100", NODES="7")
    assert done.returncode == 0, done.stderr
    # the account that was edited; of the partition, the cluster's default
    assert asked.read_text().splitlines() == [*SALLOC, "--time=1:00:00", "--constraint=a100", "--account=vision"]
    interactive(tmp_path, "--nodes=2", "--gpus=4", "run.yaml", "--set", "a.b=c", PARTITION="fast", TIME="5")
    assert asked.read_text().splitlines() == [
        *SALLOC, "--time=5", "--account=vision", "--partition=fast",
        "vlm-dist", "launch", "run.yaml", "--set", "a.b=c",
    ]  # fmt: skip
    interactive(tmp_path, "--", "srun", "nvidia-smi")
    assert asked.read_text().splitlines()[-2:] == ["srun", "nvidia-smi"]


@pytest.mark.parametrize(
    ("arguments", "environ", "why"),
    [
        (["--nodes", "two"], {}, "expected a whole number"),
        (["-N", "2"], {}, "-N is not known"),
        ([], {"SLURM_JOB_ID": "5"}, "in job 5 already"),
        (["--nodes=2", "typo.yaml"], {}, "there is no run file typo.yaml"),
        (["slurm/train.sbatch"], {}, "no vlm-dist on the PATH"),  # of files, any
    ],
)
def test_an_allocation_that_cannot_be_is_refused(arguments, environ, why, submit, tmp_path):
    probe_command(tmp_path, "salloc", "")
    done = interactive(tmp_path, *arguments, **environ)
    assert done.returncode == 2 and why in done.stderr
    assert not (tmp_path / "salloc_arguments").exists()


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
    scripts = [*PROJECT.glob("slurm/*.sbatch"), *PROJECT.glob("slurm/*.sh")]
    assert len(scripts) == 3
    subprocess.run(["shellcheck", *map(str, scripts)], check=True, env=os.environ)
