"""What a Slurm job does when its ranks have ended: it says why, and asks Slurm to run it again where that can help.

    python -m launcher.requeue EXIT_CODE     # `launcher.slurm_job` does the same; EXIT_CODE is srun's

Saved first, requeued last: Slurm ends the job's processes as soon as it is asked. A job that Slurm itself ended
(scancel, a node that failed) is not asked for again: Slurm requeues it, or it was meant to end.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.elastic_rank import FINAL
from launcher.first_error import blamed_rank, first_error, last_words, read_tail, shortened
from launcher.slurm_rank import DIRECTORY, log_path
from vlm_dist.errors import ConfigError, ExitCode

#: How often one job is started again, where MAX_REQUEUES does not say.
DEFAULT_MAX_REQUEUES = 20
#: Beside the directories of the job's lives: the step at which the last failure happened.
_LAST_FAILURE = "failed-at-step"
#: Ranks that lose a peer end so soon after it that the clocks of two nodes may tell another order.
_SECONDS_OF_ECHO = 5.0
#: Of rank 0 the job's log has everything: what stands there so near its end is not said again.
_NEAR_LINES = 40


@dataclass(frozen=True)
class End:
    """How one life of a job ended.

    Attributes:
        code: of the rank that decides: one whose code another start would repeat, else the first; negative: a signal.
        rank: that one; None: no rank has left a line.
        node: of that rank.
        step: steps that were done; -1: before the first.
    """

    code: int
    rank: int | None = None
    node: str = ""
    step: int = -1

    @property
    def is_hopeless(self) -> bool:
        """Whether another start would end the same way, or the user wanted the end."""
        return self.code in FINAL and self.code != ExitCode.PREEMPTED

    @property
    def exit_code(self) -> int:
        """As a shell tells it."""
        return 128 - self.code if self.code < 0 else self.code

    def __str__(self) -> str:
        who = "the job" if self.rank is None else f"rank {self.rank} on {self.node}"
        place = "start-up" if self.step < 0 else f"step {self.step}"
        if self.code < 0:
            return f"{who} was killed by {signal.Signals(-self.code).name} at {place}"
        name = ExitCode(self.code).name.lower() if self.code in set(ExitCode) else "unknown"
        return f"{who} ended with exit code {self.code} ({name}) at {place}"


def read_end(directory: Path, srun_code: int) -> End:
    """What the ranks of a life have left.

    Args:
        directory: of this life.
        srun_code: which is 0 only if all ranks ended with 0.
    """
    steps = [int.from_bytes(path.read_bytes()[:8], "little", signed=True) for path in directory.glob("step-*")]
    step = max(steps, default=-1)
    ends: list[tuple[float, End]] = []
    heard = set()
    for path in directory.glob("rank-*.json"):
        rank = int(path.stem[5:])
        try:
            told = json.loads(path.read_text())
            if told["code"]:
                ends.append((told["at"], End(told["code"], rank, told["node"], step)))
        except (OSError, ValueError, KeyError, TypeError):  # of a node that lost power while it was written
            continue
        heard.add(rank)
    if not srun_code:
        return End(0, step=step)
    silent = sorted({int(path.stem[5:]) for path in directory.glob("rank-*.log")} - heard)
    if silent and srun_code != ExitCode.PREEMPTED and all(end.code == ExitCode.PREEMPTED for _, end in ends):
        # ended together with who would have written its line: by the kernel for the memory of the task, or its node
        code = 128 - srun_code if srun_code - 128 in set(signal.Signals) else srun_code
        return End(code, silent[0], _node_of(directory, silent[0]), step)
    if not ends:
        return End(srun_code, step=step)
    end = _first(ends)
    # two ranks that end together may have written their lines in any order: who is named by another one was before it
    assert end.rank is not None
    blamed = blamed_rank(read_tail(log_path(directory, end.rank)))
    told_by = {told.rank: told for _, told in ends}
    if blamed in told_by:
        return end if told_by[blamed].code == ExitCode.PREEMPTED else told_by[blamed]
    if blamed in silent:
        return End(end.code, blamed, _node_of(directory, blamed), step)
    return end


def _first(ends: list[tuple[float, End]]) -> End:
    """The end that decides: a hopeless one; else the earliest, unless that only tells of another."""
    hopeless = [entry for entry in ends if entry[1].is_hopeless]
    at, end = min(hopeless or ends, key=lambda entry: entry[0])
    if end.code == ExitCode.DISTRIBUTED:
        echoes = (ExitCode.DISTRIBUTED, ExitCode.PREEMPTED)
        causes = [entry for entry in ends if entry[1].code not in echoes and entry[0] - at < _SECONDS_OF_ECHO]
        end = min(causes, key=lambda entry: entry[0])[1] if causes else end
    return end


def _node_of(directory: Path, rank: int) -> str:
    """As the first line of its log says."""
    with log_path(directory, rank).open(errors="replace") as log:
        words = log.readline().split()
    return words[3].rstrip(",") if len(words) > 3 else "a node"


def explain(directory: Path, end: End) -> list[str]:
    """What the rank that decides has said of its end, and where the rest stands.

    Args:
        directory: of this life.
        end: of it.
    """
    logs = sorted(directory.glob("rank-*.log"))
    if not logs:
        return []
    lines = []
    if end.rank is not None:
        said = read_tail(log_path(directory, end.rank))
        error = first_error(said) if end.code > 0 else []
        if error and end.rank == 0 and len(error) < _NEAR_LINES:
            lines.append("first error, of rank 0: above")
        elif error:
            lines.append(f"first error, of rank {end.rank} on {end.node}:")
            lines += [f"    {line}" for line in shortened(error)]
        else:
            lines.append(f"rank {end.rank} on {end.node} left no error; the last that it said:")
            lines += [f"    {line}" for line in last_words(said)]
        if end.code == -signal.SIGKILL:
            lines.append("killed without a word: often for want of memory (sacct -o JobID,MaxRSS,State; dmesg there)")
    lines.append(f"what each rank has said: {directory}/rank-*.log ({len(logs)})")
    return lines


def decide(end: End, restarts: int, max_requeues: int, failed_at: int | None) -> tuple[bool, str]:
    """Whether the job is to run again, and why (not).

    Args:
        end: of this life.
        restarts: lives before this one.
        max_requeues: after so many the job ends.
        failed_at: step of the failure before this one; None: there was none.
    """
    if end.code == ExitCode.DONE:
        return False, "done"
    if end.is_hopeless:
        return False, f"{end}; another start would end there again"
    if restarts >= max_requeues:
        return False, f"{end}; requeued {restarts} times already (MAX_REQUEUES={max_requeues})"
    if end.code != ExitCode.PREEMPTED and failed_at == end.step:
        return False, f"{end}; failed there twice, another start would end there again"
    return True, f"{end}; requeued ({restarts + 1} of at most {max_requeues})"


def main(srun_code: int, environ: Mapping[str, str]) -> int:
    """Decide, say so, and ask Slurm.

    Returns:
        Exit code of the job.
    """
    life = Path(environ[DIRECTORY])
    note = life.parent / _LAST_FAILURE
    end = read_end(life, srun_code)
    failed_at = _read_step(note)
    restarts = int(environ.get("SLURM_RESTART_COUNT") or 0)
    max_requeues = read_max_requeues(environ)
    again, why = decide(end, restarts, max_requeues, failed_at)
    if end.code == ExitCode.DONE:
        if environ.get("KEEP_LOGS", "") in ("", "0"):
            shutil.rmtree(life.parent, ignore_errors=True)  # nothing to tell
        return 0
    if end.code != ExitCode.PREEMPTED:
        say_all(explain(life, end))
        with contextlib.suppress(OSError):  # a disk that is full; MAX_REQUEUES counts all the same
            note.write_text(str(end.step))
    _say(why)
    if end.code == ExitCode.PREEMPTED and end.step < 0:
        _say("asked to stop before its first step: --time has to be well above the lead of --signal (10 minutes)")
    if again:
        asked = subprocess.run(  # noqa: S603
            ["scontrol", "requeue", job_name(environ)],  # noqa: S607 - wherever this cluster has it
            capture_output=True,
            text=True,
            check=False,
        )
        if asked.returncode:
            _say(f"scontrol requeue failed: {asked.stderr.strip()}; submit again with train.resume=auto")
    return end.exit_code


def read_max_requeues(environ: Mapping[str, str]) -> int:
    """How often the job may be started again.

    Raises:
        ConfigError: MAX_REQUEUES is no such number.
    """
    told = environ.get("MAX_REQUEUES") or str(DEFAULT_MAX_REQUEUES)
    if not (told.isascii() and told.isdigit()):
        raise ConfigError(f"MAX_REQUEUES={told}: expected a whole number from 0 on")
    return int(told)


def _read_step(note: Path) -> int | None:
    """Of the last failure; None: there was none, or the node failed while it was written."""
    try:
        return int(note.read_text())
    except (OSError, ValueError):
        return None


def tell_ended_by_slurm(life: Path, srun_code: int) -> None:
    """Say what the ranks have said, where it was Slurm who ended the job.

    Args:
        life: directory of it.
        srun_code: of its step.
    """
    end = read_end(life, srun_code)
    # a rank that was killed: by Slurm itself, after KillWait
    if end.code > 0 and end.code != ExitCode.PREEMPTED:
        say_all([*explain(life, end), f"{end}, as Slurm ended the job"])


def job_name(environ: Mapping[str, str]) -> str:
    """The job's id, as people write it: a task of an array is 17_3.

    Its last task has the id of the whole array, too: with that, `scontrol requeue` would mean all of them.
    """
    if environ.get("SLURM_ARRAY_JOB_ID") and environ.get("SLURM_ARRAY_TASK_ID"):
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ["SLURM_JOB_ID"]


def say_all(lines: list[str]) -> None:
    """Several lines, so that one can tell whose they are."""
    for line in lines:
        _say(line)


def _say(text: str) -> None:
    print(f"launcher.requeue: {text}", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), os.environ))
