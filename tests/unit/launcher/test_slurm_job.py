"""A life of a Slurm job: what its log says at the end, containers, lists of runs; and an old job of the same id."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import requeue
from launcher.container import find_container
from launcher.requeue import End, explain, read_end
from launcher.slurm_job import prepare_life
from launcher.slurm_rank import log_path, write_end
from launcher.sweep import choose_run, read_sweep
from vlm_dist.errors import ConfigError

PROJECT = Path(__file__).resolve().parents[3]


def ends(directory: Path, rank: int, code: int, at: float, node: str = "gpu01") -> None:
    """As `write_end`, at any time and place."""
    write_end(directory, rank, code)
    told = {"code": code, "at": at, "node": node}
    (directory / f"rank-{rank:05d}.json").write_text(json.dumps(told))


def says(directory: Path, rank: int, *lines: str, node: str = "gpu01") -> None:
    log_path(directory, rank).write_text("\n".join([f"rank {rank} on {node}, 2026-01-01 00:00:00", *lines, ""]))


def start_rank(directory: Path, rank: int, script: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"SLURM_PROCID": str(rank), "VLM_DIST_LIFE_DIRECTORY": str(directory)}
    command = [sys.executable, "-m", "launcher.slurm_rank", "-c", script]
    return subprocess.run(command, env=environ, cwd=PROJECT, capture_output=True, text=True, timeout=60)


def test_each_rank_has_a_log_and_that_of_rank_0_is_the_jobs_too(tmp_path):
    script = "import sys; print('hello'); sys.stdout.flush(); print('error: no', file=sys.stderr); sys.exit(3)"
    first, second = (start_rank(tmp_path, rank, script) for rank in (0, 1))
    assert (first.returncode, second.returncode) == (3, 3)
    assert (first.stdout, second.stdout, second.stderr) == ("hello\nerror: no\n", "", "")
    for rank in (0, 1):
        head, *lines = log_path(tmp_path, rank).read_text().splitlines()
        assert head.startswith(f"rank {rank} on {os.uname().nodename}, ")
        assert lines == ["hello", "error: no"]


def test_a_worker_that_outlives_its_rank_does_not_hold_the_job(tmp_path):
    begun = time.monotonic()
    script = "import os, sys, time\nif os.fork() == 0: time.sleep(10)\nprint('the end'); sys.exit(1)"
    ended = start_rank(tmp_path, 0, script)
    assert ended.returncode == 1 and "the end" in ended.stdout
    assert time.monotonic() - begun < 9


def test_a_rank_without_a_place_for_its_log_speaks_into_the_jobs(tmp_path):
    log_path(tmp_path, 1).mkdir()
    ended = start_rank(tmp_path, 1, "print('hello')")
    assert ended.returncode == 0
    assert "hello" in ended.stdout and "no log of its own" in ended.stderr


def test_the_first_error_of_the_rank_that_failed_by_itself(tmp_path):
    says(tmp_path, 0, "step 4", "error: another rank is gone")
    says(tmp_path, 2, "Traceback (most recent call last):", "Skipped: x", "step 4", "error: rank 2 failed at step 5",
         "Traceback (most recent call last):", "ValueError: bad", node="gpu02")  # fmt: skip
    ends(tmp_path, 0, 6, at=99.5)  # by a clock that is behind
    ends(tmp_path, 2, 1, at=100, node="gpu02")
    end = read_end(tmp_path, 6)
    assert (end.rank, end.code) == (2, 1)
    assert explain(tmp_path, end) == [
        "first error, of rank 2 on gpu02:",
        "    error: rank 2 failed at step 5",
        "    Traceback (most recent call last):",
        "    ValueError: bad",
        f"what each rank has said: {tmp_path}/rank-*.log (2)",
    ]


def test_of_a_hang_the_rank_speaks_that_has_found_it(tmp_path):
    says(tmp_path, 0, "rank 0 ends with the others, as rank 1 says", "File x, line 3")
    says(tmp_path, 1, "error: hang: nothing has moved for 20.0 min. Rank 3 lags")
    ends(tmp_path, 0, 70, at=100)
    ends(tmp_path, 1, 70, at=101)
    assert explain(tmp_path, read_end(tmp_path, 70))[1] == (
        "    error: hang: nothing has moved for 20.0 min. Rank 3 lags"
    )


@pytest.mark.parametrize("code", [1, 2])
def test_a_rank_that_tells_of_another_is_not_the_first(code, tmp_path):
    """It ends with the other one's code, and may well be done before it."""
    lost = "error: another rank is gone: rank 1 has left at step 5, forward: ValueError: bad (its own message …)"
    says(tmp_path, 0, lost)
    says(tmp_path, 1, "error: rank 1 failed at step 5, forward: ValueError: bad", node="gpu02")
    ends(tmp_path, 0, code, at=100)
    ends(tmp_path, 1, code, at=100.2, node="gpu02")
    assert read_end(tmp_path, code).rank == 1
    (tmp_path / "rank-00001.json").unlink()  # killed with its whole task, or its node is gone
    end = read_end(tmp_path, code)
    assert (end.rank, end.node, end.code) == (1, "gpu02", code)
    (tmp_path / "rank-00001.log").unlink()
    assert read_end(tmp_path, code).rank == 0


def test_ranks_still_tell_of_others_in_these_words():
    """By which the two tests above have their logs."""
    source = (PROJECT / "vlm_dist" / "distributed" / "watchdog.py").read_text()
    for words in ("rank {rank} has left at ", "rank {rank}, last heard of ", '"another rank is gone" + (": "',
                  "ends with the others, as rank {verdict.rank} says"):  # fmt: skip
        assert words in source


def test_without_an_error_of_ours_the_last_chain_of_tracebacks(tmp_path):
    chain = ["Traceback (most recent call last):", "KeyError: 1",
             "During handling of the above exception, another exception occurred:",
             "Traceback (most recent call last):", "ValueError: bad"]  # fmt: skip
    says(tmp_path, 1, "Traceback (most recent call last):", "OSError: got over", "step 1", *chain)
    assert explain(tmp_path, End(1, 1, "gpu01"))[1:-1] == [f"    {line}" for line in chain]


def test_a_long_error_loses_its_middle(tmp_path):
    says(tmp_path, 1, "error: first", *(f"  frame {n}" for n in range(500)), "ValueError: last")
    lines = explain(tmp_path, End(1, 1, "gpu01"))
    assert len(lines) < 50
    assert lines[1] == "    error: first" and lines[-2] == "    ValueError: last"


def test_an_error_of_rank_0_is_not_said_twice(tmp_path):
    says(tmp_path, 0, "error: a wrong value")
    assert explain(tmp_path, End(2, 0, "gpu01"))[0] == "first error, of rank 0: above"


def test_a_rank_that_was_killed_with_its_whole_task_is_found_by_its_silence(tmp_path):
    """The others were asked to stop for it, and say that they were preempted."""
    says(tmp_path, 0, "step 3")
    says(tmp_path, 1, "step 3", "loading", node="gpu02")
    ends(tmp_path, 0, 75, at=100)
    (tmp_path / "rank-00001.json").touch()  # its node lost power
    end = read_end(tmp_path, 137)
    assert str(end).startswith("rank 1 on gpu02 was killed by SIGKILL")
    told = explain(tmp_path, end)
    assert told[0] == "rank 1 on gpu02 left no error; the last that it said:"
    assert "    loading" in told and any("want of memory" in line for line in told)
    assert requeue.decide(end, 0, 20, failed_at=-1)[0] is False  # twice at the same step: no preemption


def test_ranks_that_were_preempted_are_no_failure(tmp_path):
    for rank in range(2):
        says(tmp_path, rank)
    ends(tmp_path, 0, 75, at=1)
    assert read_end(tmp_path, 75).code == 75  # rank 1 had no time to tell


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "demo"}


def test_nothing_of_an_older_job_with_this_id_is_believed(tmp_path):
    first = prepare_life(tmp_path, JOB, 0)
    assert first == tmp_path / "slurm-demo-7" / "life-0"
    ends(first, 0, 2, at=1)
    (first.parent / "failed-at-step").write_text("3")
    ends(prepare_life(tmp_path, JOB, 1), 0, 2, at=1)
    assert sorted(path.name for path in first.parent.iterdir()) == ["failed-at-step", "life-0", "life-1"]

    again = prepare_life(tmp_path, JOB, 0)  # Slurm counts from 1 again
    assert [path.name for path in again.parent.iterdir()] == ["life-0"] and not list(again.iterdir())
    assert len(list(tmp_path.glob("slurm-demo-7.old-*/life-1/rank-00000.json"))) == 1
    ends(again.parent / "life-0", 0, 75, at=1)
    (again.parent / "life-2").mkdir()  # of a job whose first life was lost before it began
    assert not list(prepare_life(tmp_path, JOB, 2).iterdir())
    assert (again / "rank-00000.json").exists()


def test_tasks_of_an_array_do_not_share_a_directory_or_a_requeue():
    task = JOB | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert requeue.job_name(task) == "7_3"
    assert requeue.job_name(JOB) == "7"


def test_a_list_of_runs(tmp_path):
    path = tmp_path / "rates.txt"
    path.write_text(
        "# rates\n\nconfigs/run.yaml train.learning_rate=1e-4   # low\n--set peft.r=8 --set 'train.run_name=a b'\n"
        "other.yaml train.output_dir=runs/own\n"
    )
    low, small, own = read_sweep(path)
    assert (low.run_file, small.run_file, own.run_file) == ("configs/run.yaml", None, "other.yaml")
    assert low.arguments == ["--set", "train.learning_rate=1e-4", "--set", "train.output_dir=runs/rates/1"]
    assert small.overrides == ("peft.r=8", "train.run_name=a b")
    assert own.output_dir == "runs/own"
    assert choose_run(path, 3) == own
    with pytest.raises(ConfigError, match=r"has 3 runs, and this is task 4 .*--array=1-3"):
        choose_run(path, 4)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a.yaml train.output_dir=x\nb.yaml train.output_dir=x/\n", "line 2: train.output_dir=x is that of line 1"),
        ("a.yaml learning_rate 3\n", "line 1: 'learning_rate' is no override"),
        ("a.yaml --resume\n", "line 1: '--resume' is no override"),
        ("a.yaml 'x=1\n", "line 1: No closing quotation"),
    ],
)
def test_a_list_that_is_wrong_names_its_line(text, why, tmp_path):
    (tmp_path / "sweep.txt").write_text(text)
    with pytest.raises(ConfigError, match=why):
        read_sweep(tmp_path / "sweep.txt")


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A folder of commands, alone on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name: str, text: str) -> None:
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)

    return make


def test_containers_that_cannot_be_are_refused_with_one_message(tmp_path, commands):
    image = tmp_path / "a.sif"
    image.touch()
    for environ, why in (
        ({"CONTAINER": str(image), "PYXIS_IMAGE": "b"}, "one kind of container at a time"),
        ({"CONTAINER": str(image)}, "needs the command apptainer"),
        ({"CONTAINER_MOUNTS": "/data"}, "need CONTAINER=image.sif or PYXIS_IMAGE"),
    ):
        with pytest.raises(ConfigError, match=why):
            find_container(environ, tmp_path)
    commands("srun", "echo '  --container=path  OCI bundle'")
    with pytest.raises(ConfigError, match="pyxis plugin, which this cluster's does not have"):
        find_container({"PYXIS_IMAGE": "b"}, tmp_path)
    commands("apptainer", "")
    with pytest.raises(ConfigError, match="there is no such file"):
        find_container({"CONTAINER": str(tmp_path / "b.sif")}, tmp_path)


def test_an_image_of_pyxis_becomes_options_of_srun(tmp_path, commands):
    commands("srun", "echo '      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH'")
    environ = {"PYXIS_IMAGE": "nvcr.io#nvidia/pytorch:24.10-py3", "CONTAINER_MOUNTS": "/data,/from:/to:ro"}
    found = find_container(environ, tmp_path)
    assert found.command == ()
    assert found.srun_options == (
        "--container-image=nvcr.io#nvidia/pytorch:24.10-py3",
        f"--container-mounts={tmp_path}:{tmp_path},/data:/data,/from:/to:ro",
        f"--container-workdir={tmp_path}",
    )


def test_a_step_that_cannot_be_noted_or_read_does_not_keep_the_job_from_going_on(tmp_path, monkeypatch, commands):
    commands("scontrol", f'echo "$*" >>{tmp_path}/asked')
    life = tmp_path / "life-0"
    life.mkdir()
    says(life, 1, "error: the cause")
    ends(life, 1, 1, at=1)
    environ = JOB | {"VLM_DIST_LIFE_DIRECTORY": str(life)}
    (tmp_path / "failed-at-step").touch()  # its node failed in that moment
    assert requeue.main(1, environ) == 1
    (tmp_path / "failed-at-step").unlink()
    (tmp_path / "failed-at-step").mkdir()  # nothing can be written
    assert requeue.main(1, environ) == 1
    assert (tmp_path / "asked").read_text() == "requeue 7\n" * 2


def test_slurm_ends_the_job_and_a_rank_had_failed(tmp_path, capsys):
    says(tmp_path, 1, "error: the cause")
    ends(tmp_path, 1, 1, at=1)
    requeue.tell_ended_by_slurm(tmp_path, 128 + signal.SIGTERM)
    told = capsys.readouterr().err
    assert "error: the cause" in told and "as Slurm ended the job" in told


def test_ranks_that_slurm_kills_have_not_failed(tmp_path, capsys):
    """Those that need longer to save than KillWait."""
    says(tmp_path, 0, "step 3")
    says(tmp_path, 1, "step 3")
    ends(tmp_path, 1, 75, at=1)
    requeue.tell_ended_by_slurm(tmp_path, 137)
    assert capsys.readouterr().err == ""
