"""Processes with a deadline: what they said, and how they ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.report import ROOT
from vlm_dist.distributed.group import free_port

#: Between SIGTERM, on which our trainer ends after its step, and SIGKILL.
GRACE_SECONDS = 15
TIMED_OUT = 124
_TAIL_LINES = 25


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        exit_code: 124 where it was ended at its deadline.
        stdout: all that it printed, errors too.
        seconds: from start to end.
    """

    exit_code: int
    stdout: str
    seconds: float

    @property
    def tail(self) -> str:
        """The last lines."""
        return "\n".join(self.stdout.splitlines()[-_TAIL_LINES:])


@dataclass(frozen=True)
class Command:
    """Starts processes of this interpreter.

    Attributes:
        directory: where they run, and where their output is kept.
        num_gpus: processes of a training; 0: one, on the CPU.
        clock: seconds, growing.
    """

    directory: Path
    num_gpus: int
    clock: Callable[[], float] = time.monotonic

    def python(self, arguments: Sequence[str], seconds: float, *, name: str) -> Outcome:
        """One process."""
        return self._run([sys.executable, *arguments], seconds, name)

    def script(self, arguments: Sequence[str], seconds: float, *, name: str) -> Outcome:
        """A command that is installed beside this interpreter."""
        program, *rest = arguments
        return self._run([str(Path(sys.executable).parent / program), *rest], seconds, name)

    def module(self, arguments: Sequence[str], seconds: float, *, name: str) -> Outcome:
        """A training of ours: `deepspeed --num_gpus N -m …`."""
        launcher = ["deepspeed", "--num_gpus", str(max(1, self.num_gpus)), "--master_port", str(free_port())]
        return self.script([*launcher, "-m", *arguments], seconds, name=name)

    def spread(self, arguments: Sequence[str], seconds: float, *, name: str) -> Outcome:
        """A training of a peer's: one process for each GPU."""
        if self.num_gpus < 2:
            return self.python(["-m", *arguments], seconds, name=name)
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(self.num_gpus)]
        launcher += ["--master_port", str(free_port())]
        return self.python([*launcher, "-m", *arguments], seconds, name=name)

    def _run(self, words: list[str], seconds: float, name: str) -> Outcome:
        log = self.directory / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                words, cwd=self.directory, env=_environment(self.num_gpus), stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(max(1.0, seconds - GRACE_SECONDS))
            except subprocess.TimeoutExpired:
                code = _end(process)
        return Outcome(code, log.read_text(errors="replace"), time.monotonic() - started)


def _end(process: subprocess.Popen[bytes]) -> int:
    for kind, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)  # its launcher and all ranks; a session of our own making
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            break
    return TIMED_OUT


def _environment(num_gpus: int) -> dict[str, str]:
    """Offline, without what a surrounding launcher has set."""
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
    if num_gpus == 0:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return environment
