"""One rank under `srun`: starts the trainer as its child, and writes down how it ended.

What srun gives back is the largest exit code of all ranks. But a rank that fails has the others ended, and those save
and leave with the code of a preemption, which would win over that of a wrong configuration. So each rank that fails
leaves a line, by which `launcher.requeue` finds the one that was first. What it prints goes to a file of its own, that
of rank 0 to the job's log, too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

from launcher.lifeline import STOP_SIGNALS, end_with_parent, shielded

#: Where the ranks of one life of a job write how they end; on a file system that all nodes see.
DIRECTORY = "VLM_DIST_LIFE_DIRECTORY"
#: See `vlm_dist.distributed.progress`, which needs torch's package.
_STEP_DIRECTORY = "VLM_DIST_STEP_DIRECTORY"
#: A data worker that outlives its rank may hold the pipe open: its last words are not waited for longer.
_DRAIN_SECONDS = 3.0


def main(command: list[str]) -> int:
    """Run a rank to its end.

    Args:
        command: what Python is given: `-m module ...` or a script.

    Returns:
        The rank's exit code, as a shell tells it.
    """
    me = os.getpid()
    directory = Path(os.environ[DIRECTORY])
    rank = int(os.environ["SLURM_PROCID"])
    environment = dict(os.environ)
    if rank == 0:
        environment[_STEP_DIRECTORY] = str(directory)  # one rank's steps are all ranks' steps
    # Slurm signals every process of a task: what is for the trainer reaches it without our help, and must not end us
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: None)
    with shielded():  # the trainer lets them in when it listens; before, they would kill it
        child = subprocess.Popen(  # noqa: S603
            [sys.executable, *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # one file: what was said between two errors belongs there
            preexec_fn=lambda: end_with_parent(parent=me),
        )
    assert child.stdout is not None
    pump = threading.Thread(target=_copy_output, args=(child.stdout, directory, rank), daemon=True)
    pump.start()
    code = child.wait()
    pump.join(_DRAIN_SECONDS)
    try:
        write_end(directory, rank, code)
    except OSError as error:  # the code itself still counts
        print(f"launcher.slurm_rank: rank {rank} cannot tell its end: {error}", file=sys.stderr, flush=True)  # noqa: T201
    return 128 - code if code < 0 else code


def log_path(directory: Path, rank: int) -> Path:
    """Where a rank's output goes.

    Args:
        directory: of this life of the job.
        rank: over all nodes.
    """
    return directory / f"rank-{rank:05d}.log"


def _copy_output(output: BinaryIO, directory: Path, rank: int) -> None:
    """To the rank's file, that of rank 0 to our own output, too, until it ends. A disk that is full stops nobody."""
    targets: list[int] = [1] if rank == 0 else []
    try:
        log = os.open(log_path(directory, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(log, f"rank {rank} on {os.uname().nodename}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        targets.append(log)
    except OSError as error:
        targets = [1]
        print(f"launcher.slurm_rank: rank {rank} has no log of its own: {error}", file=sys.stderr, flush=True)  # noqa: T201
    while data := os.read(output.fileno(), 1 << 16):
        for target in tuple(targets):
            try:
                _write_all(target, data)
            except OSError:
                if len(targets) > 1:  # what is left of it goes to the other
                    targets.remove(target)


def _write_all(target: int, data: bytes) -> None:
    while data:
        data = data[os.write(target, data) :]


def write_end(directory: Path, rank: int, code: int) -> None:
    """Leave the rank's line, whole or not at all.

    Args:
        directory: of this life of the job.
        rank: over all nodes.
        code: exit code; negative for a signal.
    """
    temporary = directory / f"rank-{rank:05d}.part"
    # the nodes' common clock: the order of two ranks matters, and Slurm itself needs clocks that agree
    temporary.write_text(json.dumps({"code": code, "at": time.time(), "node": os.uname().nodename}))
    temporary.rename(temporary.with_suffix(".json"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
