"""The batch step of slurm/train.sbatch: starts the ranks of one life of a job, and decides what comes after it.

    python -m launcher.slurm_job RUN.yaml [--set section.key=value ...]

Needs nothing but Python 3.9 itself: with a container, the packages are inside it, and this runs outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from launcher import requeue
from launcher.container import find_container
from launcher.handed_on import own_variables
from launcher.slurm_rank import DIRECTORY
from launcher.sweep import choose_run
from vlm_dist.distributed.rendezvous import job_port
from vlm_dist.errors import ConfigError, VlmDistError

#: A rank that is set here would be the same in every task; srun gives each its own (SLURM_PROCID, SLURM_LOCALID).
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
#: Beside the directories of the job's lives: what the task of an array has taken from the list.
_CHOSEN = "run.json"


def main(arguments: list[str], environ: Mapping[str, str]) -> int:
    """Run a life of the job.

    Args:
        arguments: run file, and what else the trainer is given.
        environ: of the batch script.

    Returns:
        Exit code of the job.
    """
    environ = own_variables(environ)
    life = int(environ.get("SLURM_RESTART_COUNT") or 0)
    try:
        requeue.read_max_requeues(environ)  # hours before it is needed
        run_file, trainer = _read_run(arguments, environ, life)
        container = find_container(environ, Path.cwd())
        environment = make_environment(environ)
        directory = prepare_life(Path.cwd(), environ, life)
        if environ.get("SWEEP"):
            with contextlib.suppress(OSError):  # the list is read again then
                (directory.parent / _CHOSEN).write_text(json.dumps([arguments, environ["SWEEP"], run_file, trainer]))
    except VlmDistError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return int(error.exit_code)
    environment[DIRECTORY] = str(directory)
    if life:
        # a later life goes on where the one before has saved; so does its wandb run: its id is in the output directory
        trainer += ["--set", "train.resume=auto"]
    command = [
        "srun",
        "--export=ALL",  # with `sbatch --export=NONE` srun would drop what is set here, too
        # a rank that failed leaves the others waiting in a collective; else they burn the rest of the job's time
        "--kill-on-bad-exit=1",
        # since Slurm 22.05 srun does not take it over from the job, and every task would get one core
        f"--cpus-per-task={environ.get('SLURM_CPUS_PER_TASK') or 1}",
        *container.srun_options,
        *container.command,
        *("python", "-m", "launcher.slurm_rank", "-m", "vlm_dist.train", "--config", run_file, *trainer),
    ]
    meeting = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    print(  # noqa: T201
        f"job {requeue.job_name(environ)}, life {life}: {environ.get('SLURM_NTASKS', '?')} ranks on "
        f"{environ.get('SLURM_JOB_NODELIST', '?')}, meeting at {meeting}, {run_file}; logs of all ranks: {directory}",
        flush=True,
    )
    code, ended_by_slurm = _run_step(command, environment)
    if ended_by_slurm:
        requeue.tell_ended_by_slurm(directory, code)
        return code
    return requeue.main(code, environment)


def make_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What the ranks get.

    Raises:
        ConfigError: this is no job of Slurm.
    """
    nodes = environ.get("SLURM_JOB_NODELIST", "")
    if not nodes or not environ.get("SLURM_JOB_ID"):
        raise ConfigError("SLURM_JOB_ID and SLURM_JOB_NODELIST are not set; submit slurm/train.sbatch with sbatch")
    shown = subprocess.run(  # noqa: S603
        ["scontrol", "show", "hostnames", nodes],  # noqa: S607 - wherever this cluster has it
        capture_output=True,
        text=True,
        check=False,
    )
    hosts = shown.stdout.split()
    if shown.returncode or not hosts:
        raise ConfigError(f"scontrol show hostnames {nodes} failed: {shown.stderr.strip() or 'it names none'}")
    environment = {name: value for name, value in environ.items() if name not in _RANK_VARIABLES}
    # all ranks meet at the first node: rank 0 runs there. The port from the job's id, so that two jobs on one node do
    # not meet; a variable of a step, if this shell is one's, would be another port
    environment["MASTER_ADDR"] = hosts[0]
    environment["MASTER_PORT"] = str(job_port({"SLURM_JOB_ID": environ["SLURM_JOB_ID"]}))
    # as many threads as the task has cores would fight with the data workers for them
    environment.setdefault("OMP_NUM_THREADS", "1")
    # Python's output at once, not when a buffer is full: the log of a killed job would lack its last lines
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def prepare_life(project: Path, environ: Mapping[str, str], life: int) -> Path:
    """Make the directory where the ranks of this life write; nothing of another job is in it.

    Job ids come again when a cluster's database was set up anew, and then an old job's directory has this one's name.

    Args:
        project: directory of the job, which all nodes see.
        environ: of the batch script.
        life: 0 for the first.

    Raises:
        ConfigError: it cannot be written.
    """
    place = _place(project, environ)
    directory = place / f"life-{life}"
    try:
        if life == 0 and place.exists():
            place.rename(place.with_name(f"{place.name}.old-{time.strftime('%Y%m%dT%H%M%S')}"))
        for old in place.glob("life-*"):
            if old.name[5:].isdigit() and int(old.name[5:]) >= life:  # no life of this job has been there yet
                shutil.rmtree(old)
        directory.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"{directory}: cannot be written ({error.strerror}); submit from a directory that can"
        ) from None
    return directory


def _place(project: Path, environ: Mapping[str, str]) -> Path:
    """The directory of all lives of the job."""
    name = environ.get("SLURM_JOB_NAME") or "vlm-dist"
    return project / f"slurm-{name.replace('/', '_')}-{requeue.job_name(environ)}"


def _read_run(arguments: list[str], environ: Mapping[str, str], life: int) -> tuple[str, list[str]]:
    """Run file, and what the trainer is given after it; of an array with a list, those of this task."""
    if not arguments:
        raise ConfigError("no run file was given: python -m launcher.slurm_job RUN.yaml [--set section.key=value ...]")
    run_file, trainer = arguments[0], list(arguments[1:])
    if environ.get("SWEEP"):
        task = environ.get("SLURM_ARRAY_TASK_ID", "")
        if not task.isdigit():
            raise ConfigError("SWEEP names a list of runs, but this job is no array: sbatch --array=1-N")
        if life and (kept := _kept_run(_place(Path.cwd(), environ), arguments, environ["SWEEP"])):
            return kept  # the list may have been edited since, for the next array
        run = choose_run(Path(environ["SWEEP"]), int(task))
        run_file = run.run_file or run_file
        trainer = [*trainer, *run.arguments]  # the later one counts: what all have in common comes first
    if not Path(run_file).is_file():
        raise ConfigError(f"there is no run file {run_file} in {Path.cwd()}; RUN_FILE=… says which")
    return run_file, trainer


def _kept_run(place: Path, arguments: list[str], sweep: str) -> tuple[str, list[str]] | None:
    """What an earlier life of the task has trained; None: it has not come so far."""
    try:
        given, of_list, run_file, trainer = json.loads((place / _CHOSEN).read_text())
    except (OSError, ValueError):
        return None
    return (run_file, trainer) if (given, of_list) == (arguments, sweep) else None


def _run_step(command: list[str], environment: Mapping[str, str]) -> tuple[int, bool]:
    """Start the ranks and wait for them.

    Returns:
        srun's exit code, and whether Slurm has ended the job meanwhile.
    """
    ended_by_slurm = False
    early: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def on_term(number: int, frame: FrameType | None) -> None:
        # scancel, node failure, Slurm's own requeue: the ranks get it, too, and save; what comes next is not for us
        nonlocal ended_by_slurm
        ended_by_slurm = True

    def on_usr1(number: int, frame: FrameType | None) -> None:
        if child is None:
            early.append(number)
        else:  # from --signal=B:USR1, which reaches this process alone
            child.send_signal(number)

    signal.signal(signal.SIGTERM, on_term)
    signal.signal(signal.SIGUSR1, on_usr1)
    child = subprocess.Popen(command, env=dict(environment))  # noqa: S603
    for number in early:
        child.send_signal(number)
    code = child.wait()
    return (128 - code if code < 0 else code), ended_by_slurm


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
