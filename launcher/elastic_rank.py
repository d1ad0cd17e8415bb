"""One rank of `launcher.elastic`: starts the trainer as its child, and writes down how it ended.

The elastic agent stops everything at a rank that fails. What is no failure of the machine (a wrong config, a checkpoint
written on request) must not look like one, so it gets 0 then, and the launcher reads the true exit code here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from launcher.lifeline import end_with_parent
from vlm_dist.errors import ExitCode

#: Where the ranks of one start write how they end.
DIRECTORY = "VLM_DIST_ELASTIC_DIRECTORY"
#: Exit codes that another start would only repeat, or that are wanted.
FINAL = frozenset(
    {
        ExitCode.DONE,
        ExitCode.CONFIG,
        ExitCode.DATA,
        ExitCode.MODEL,
        ExitCode.CHECKPOINT,
        ExitCode.DIVERGED,
        ExitCode.PREEMPTED,
        128 + signal.SIGINT,
    }
)


def main(command: list[str]) -> int:
    """Run a rank to its end.

    Args:
        command: what Python is given: `-m module ...` or a script.

    Returns:
        What the agent is told: 0, or 1 for what may be tried again.
    """
    end_with_parent()
    me = os.getpid()

    place = Path(os.environ[DIRECTORY]) / f"rank-{int(os.environ['RANK']):05d}"
    child = subprocess.Popen([sys.executable, *command], preexec_fn=lambda: end_with_parent(parent=me))  # noqa: S603

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    # the agent's way to end the others when one has failed; requests to stop go from the launcher to the trainer
    signal.signal(signal.SIGTERM, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    place.with_suffix(".pid").write_text(str(child.pid))
    code = child.wait()
    told = {"code": code, "at": time.monotonic()}
    temporary = place.with_suffix(".part")
    temporary.write_text(json.dumps(told))
    temporary.rename(place.with_suffix(".json"))
    return 0 if code in FINAL else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
