"""Variables of another job of Slurm that look like this one's.

sbatch hands on the environment of the shell that it is called in. Where that shell is itself of a job, of an array or
one that was requeued, its SLURM_ARRAY_* and SLURM_RESTART_COUNT come along, and Slurm overwrites them only where the
new job has such ones: a first life would count as a later one, and `scontrol requeue` would mean the other job.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping

_ARRAY = "SLURM_ARRAY_"
_RESTARTS = "SLURM_RESTART_COUNT"


def own_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment, with the job's array and number of lives as Slurm itself knows them.

    Args:
        environ: of the batch script; unchanged where it has nothing to doubt, or Slurm does not answer.
    """
    number = environ.get("SLURM_JOB_ID", "")
    is_doubtful = environ.get(_RESTARTS) or any(name.startswith(_ARRAY) for name in environ)
    told = _ask(number) if number and is_doubtful else ""
    # JobId=18 ArrayJobId=17 ArrayTaskId=3 ArrayTaskThrottle=2 JobName=…
    own = re.search(rf"^JobId={number} ((?:\w+=\S* )*?)JobName=", told, re.MULTILINE)
    if own is None:
        return dict(environ)
    is_task = "ArrayJobId=" in own[1]
    without = {name: value for name, value in environ.items() if is_task or not name.startswith(_ARRAY)}
    restarts = re.search(r" Restarts=(\d+) ", told[own.start() :].partition("\n")[0])
    if restarts is not None:
        without[_RESTARTS] = restarts[1]
    return without


def _ask(number: str) -> str:
    """One line for each job of that number; of an array's, all its tasks."""
    try:
        shown = subprocess.run(  # noqa: S603
            ["scontrol", "-o", "show", "job", number],  # noqa: S607 - wherever this cluster has it
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if shown.returncode else shown.stdout
