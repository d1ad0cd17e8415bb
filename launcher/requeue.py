"""What a Slurm job does when its ranks have ended: it asks Slurm to run it again where that can help.

    python -m launcher.requeue EXIT_CODE     # the last line of slurm/train.sbatch; EXIT_CODE is srun's

Saved first, requeued last: Slurm ends the job's processes as soon as it is asked. A job that Slurm itself ended
(scancel, a node that failed) does not come here: Slurm requeues it, or it was meant to end.
"""

from __future__ import annotations

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
from launcher.slurm_rank import DIRECTORY
from vlm_dist.errors import ExitCode

#: How often one job is started again, where MAX_REQUEUES does not say.
DEFAULT_MAX_REQUEUES = 20
#: Beside the directories of the job's lives: the step at which the last failure happened.
_LAST_FAILURE = "failed-at-step"


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
    ends = []
    for path in directory.glob("rank-*.json"):
        told = json.loads(path.read_text())
        end = End(told["code"], int(path.stem[5:]), told["node"], step)
        ends.append((not end.is_hopeless, told["at"], end))
    if srun_code and ends:
        return min(ends, key=lambda entry: entry[:2])[2]
    return End(srun_code, step=step)


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
    failed_at = int(note.read_text()) if note.is_file() else None
    restarts = int(environ.get("SLURM_RESTART_COUNT") or 0)
    max_requeues = int(environ.get("MAX_REQUEUES") or DEFAULT_MAX_REQUEUES)
    again, why = decide(end, restarts, max_requeues, failed_at)
    if end.code == ExitCode.DONE:
        shutil.rmtree(life.parent, ignore_errors=True)  # nothing to tell
        return 0
    _say(why)
    if end.code != ExitCode.PREEMPTED:
        note.write_text(str(end.step))
    if again:
        asked = subprocess.run(  # noqa: S603
            ["scontrol", "requeue", environ["SLURM_JOB_ID"]],  # noqa: S607 - wherever this cluster has it
            capture_output=True,
            text=True,
            check=False,
        )
        if asked.returncode:
            _say(f"scontrol requeue failed: {asked.stderr.strip()}; submit again with train.resume=auto")
    return end.exit_code


def _say(text: str) -> None:
    print(f"launcher.requeue: {text}", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), os.environ))
