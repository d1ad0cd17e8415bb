"""Train, and start again by itself what may succeed the next time: a rank that was killed, that hung or that crashed.

    python -m launcher.elastic --nproc_per_node 8 --max_restarts 3 -m vlm_dist.train --config configs/run.yaml

Options before `-m` are those of `torchrun`, whose elastic agent starts the ranks and finds the other nodes. Each start
is an agent of its own; whether there is another one is decided here, by exit codes that an agent does not know.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launcher.elastic_rank import DIRECTORY, FINAL
from launcher.lifeline import STOP_SIGNALS, end_with_parent, shielded
from vlm_dist.errors import ExitCode

#: Between two starts: the port, and the other nodes' agents, have to be free.
PAUSE_SECONDS = 3.0
_LOOK_SECONDS = 0.2
#: What torchrun takes for --nproc_per_node beside a number.
_PROCESS_WORDS = ("auto", "gpu", "cpu", "xpu")
#: See `vlm_dist.distributed.progress`, which needs torch's package.
_STEP_DIRECTORY = "VLM_DIST_STEP_DIRECTORY"


@dataclass(frozen=True)
class Outcome:
    """How one start ended on this node.

    Attributes:
        code: of the rank that ended first with something else than 0; negative for a signal.
        rank: that one; None: no rank has said anything.
        step: steps that were done when it ended; -1: before the first.
    """

    code: int
    rank: int | None
    step: int

    @property
    def is_final(self) -> bool:
        """Whether another start would be for nothing."""
        return self.code in FINAL

    @property
    def exit_code(self) -> int:
        """As a shell tells it."""
        return 128 - self.code if self.code < 0 else self.code

    def __str__(self) -> str:
        if self.rank is None:
            return f"the elastic agent {_describe(self.code)} before any rank had"
        return f"rank {self.rank} {_describe(self.code)} at {self.place}"

    @property
    def place(self) -> str:
        """Where in the run."""
        return "start-up" if self.step < 0 else f"step {self.step}"


def _describe(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    names = {ExitCode.HANG: " (it hung)", ExitCode.DISTRIBUTED: " (another rank was gone)"}
    return f"ended with exit code {code}" + names.get(ExitCode(code) if code in set(ExitCode) else ExitCode.DONE, "")


def read_outcome(directory: Path, agent_code: int) -> Outcome:
    """What the ranks of a start have written down.

    A code that no other start can better wins; else the first that failed, as the others only followed. With 75, too:
    the agent ends them with SIGTERM.
    """
    hopeless = FINAL - {ExitCode.PREEMPTED}
    ends = []
    for path in directory.glob("rank-*.json"):
        told = json.loads(path.read_text())
        ends.append((told["code"] not in hopeless, told["at"], int(path.stem[5:]), told["code"]))
    steps = [int.from_bytes(path.read_bytes()[:8], "little", signed=True) for path in directory.glob("step-*")]
    step = max(steps, default=-1)
    failed = sorted(end for end in ends if end[3] != 0)
    if failed:
        return Outcome(failed[0][3], failed[0][2], step)
    if ends and agent_code == 0:
        return Outcome(0, min(end[2] for end in ends), step)
    return Outcome(agent_code or int(ExitCode.FAILURE), None, step)


class Supervisor:
    """Starts agents until the run is over.

    Args:
        agent_options: of torch.distributed.run.
        command: what each rank runs: `-m module ...` or a script.
        max_restarts: starts after the first.
    """

    def __init__(self, agent_options: Sequence[str], command: Sequence[str], max_restarts: int) -> None:
        self._agent_options = list(agent_options)
        self._command = list(command)
        self._max_restarts = max_restarts
        self._asked: list[int] = []  # signals, in their order
        self._delivered: dict[int, int] = {}  # process id of a rank -> how many of them it has got
        self._directory = Path(tempfile.mkdtemp(prefix="vlm-dist-elastic-"))
        self._start_directory = self._directory

    def run(self) -> int:
        """Run to the end; gives back the exit code."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._pass_on)
        try:
            return self._run()
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _run(self) -> int:
        failed_at: int | None = None
        for start in range(self._max_restarts + 1):
            outcome = self._start(start)
            if outcome.is_final:
                return outcome.exit_code
            if self._asked:
                _say(f"{outcome}; it was asked to stop, so it is not started again")
                return outcome.exit_code
            if failed_at == outcome.step:
                _say(f"{outcome}: failed at {outcome.place} twice; another restart would end there again")
                return outcome.exit_code
            failed_at = outcome.step
            if start < self._max_restarts:
                _say(f"{outcome}: restart {start + 1} of {self._max_restarts}, from the newest checkpoint")
                time.sleep(PAUSE_SECONDS)
                if self._asked:
                    return int(ExitCode.PREEMPTED)
        _say(f"{outcome}; no restart is left (--max_restarts {self._max_restarts})")
        return outcome.exit_code

    def _start(self, number: int) -> Outcome:
        """One agent, from its start to its end."""
        directory = self._start_directory = self._directory / str(number)
        directory.mkdir()
        environment = os.environ | {DIRECTORY: str(directory), _STEP_DIRECTORY: str(directory)}
        command = [sys.executable, "-m", "torch.distributed.run", "--max_restarts", "0", *self._agent_options]
        command += ["-m", "launcher.elastic_rank", *self._command]
        if number:
            command += ["--set", "train.resume=auto"]
        me = os.getpid()
        with shielded():  # torch's agent would kill the ranks 30 s after a signal, whatever they are writing
            agent = subprocess.Popen(  # noqa: S603
                command, env=environment, start_new_session=True, preexec_fn=lambda: end_with_parent(parent=me)
            )
        while agent.poll() is None:
            self._deliver()  # also to ranks that were not there yet
            time.sleep(_LOOK_SECONDS)
        self._wait_for_ranks()
        code = agent.returncode
        return read_outcome(directory, code)

    def _wait_for_ranks(self) -> None:
        """Ranks of an agent that was killed end with it; the next ones must not meet them."""
        deadline = time.monotonic() + 30
        while any(_lives(pid) for pid in self._rank_pids()) and time.monotonic() < deadline:
            time.sleep(0.1)

    def _rank_pids(self) -> list[int]:
        return [int(path.read_text() or 0) for path in self._start_directory.glob("rank-*.pid")]

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._asked.append(number)

    def _deliver(self) -> None:
        """Hand requests to stop to all ranks of this node, each once."""
        if not self._asked:
            return
        for pid in self._rank_pids():
            for number in self._asked[self._delivered.get(pid, 0) :]:
                if pid and _lives(pid):
                    os.kill(pid, number)
                    self._delivered[pid] = self._delivered.get(pid, 0) + 1


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _say(text: str) -> None:
    print(f"launcher.elastic: {text}", file=sys.stderr, flush=True)  # noqa: T201


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The launcher's and torchrun's options, and the command from `-m` (or a script's path) on."""
    for position, argument in enumerate(arguments):
        if argument in ("-m", "--module"):
            return list(arguments[:position]), ["-m", *arguments[position + 1 :]]
        if argument.endswith(".py") and (position == 0 or "=" in arguments[position - 1] or position > 1):
            return list(arguments[:position]), list(arguments[position:])
    return list(arguments), []


def _value_of(options: Sequence[str], *names: str) -> str | None:
    """What one of torchrun's options is set to: `--name value` or `--name=value`."""
    for position, option in enumerate(options):
        name, equals, value = option.partition("=")
        if name.lstrip("-") in names:
            return value if equals else next(iter(options[position + 1 :]), "")
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; gives back the exit code of the run."""
    options, command = split_arguments(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m launcher.elastic",
        description="Train, and restart from the newest checkpoint when a rank is killed, hangs or crashes.",
        usage="%(prog)s [--max_restarts N] [options of torchrun] -m vlm_dist.train --config RUN.yaml",
        epilog="Exit codes: of the run, see docs/faults.md. Signals to this process reach all ranks.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--max_restarts", "--max-restarts", type=int, default=3, metavar="N", help="restarts (%(default)s)"
    )
    mine, agent_options = parser.parse_known_args(options)
    if mine.max_restarts < 0:
        parser.error(f"--max_restarts {mine.max_restarts}: expected 0 or more")
    processes = _value_of(agent_options, "nproc_per_node", "nproc-per-node")
    if processes is not None and processes not in _PROCESS_WORDS and not (processes.isdigit() and int(processes)):
        parser.error(f"--nproc_per_node {processes}: expected a number from 1 on, or {', '.join(_PROCESS_WORDS)}")
    if not command:
        parser.error("what to run is missing: -m vlm_dist.train --config RUN.yaml")
    if not any(option.startswith(("--nnodes", "--rdzv", "--master", "--standalone")) for option in agent_options):
        agent_options = ["--standalone", *agent_options]
    return Supervisor(agent_options, command, mine.max_restarts).run()


if __name__ == "__main__":
    sys.exit(main())
