"""Where the ranks of a Slurm step meet, when nobody has said it: at the first node, at a port of the job's own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from vlm_dist.errors import DistributedError

#: Below 32768, where Linux begins to pick ports by itself, and clear of those that people choose by hand.
FIRST_PORT, NUM_PORTS = 15000, 15000
#: Steps of one job that run beside each other; a prime, so that they don't fall on the ports of the next jobs.
_STEP_STRIDE = 7919

_NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")


def meeting_point(environ: Mapping[str, str]) -> tuple[str, int]:
    """Address and port for rank 0 of a step, the same on every task.

    Args:
        environ: of a task that srun has started.

    Raises:
        DistributedError: Slurm's variables do not tell.
    """
    name = next((name for name in _NODE_LISTS if environ.get(name)), None)
    if name is None or not environ.get("SLURM_JOB_ID"):
        missing = f"{' and '.join(_NODE_LISTS[:2])} are" if name is None else "SLURM_JOB_ID is"
        raise DistributedError(
            f"MASTER_ADDR and MASTER_PORT are not set, and {missing} missing, from which they would follow; "
            "start with slurm/train.sbatch, or set both in the batch script"
        )
    return expand_hostlist(environ[name])[0], job_port(environ)


def job_port(environ: Mapping[str, str]) -> int:
    """A port that two jobs, or two steps of a job, share only if their ids lie a multiple of 15,000 apart."""
    job, step = (environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    if not (job.isdigit() and step.isdigit()):
        raise DistributedError(f"SLURM_JOB_ID={job}, SLURM_STEP_ID={step}: expected whole numbers; set MASTER_PORT")
    return FIRST_PORT + (int(job) + _STEP_STRIDE * int(step)) % NUM_PORTS


def expand_hostlist(text: str) -> list[str]:
    """Slurm's short form of node names, written out: `gpu[07-08,10],login` -> gpu07, gpu08, gpu10, login.

    Raises:
        DistributedError: it is not such a form.
    """
    hosts = [host for part in _split_outside_brackets(text) for host in _expand(part, text)]
    if not hosts:
        raise DistributedError(f"the list of nodes is {text!r}, expected a form like gpu[01-04]")
    return hosts


def _split_outside_brackets(text: str) -> list[str]:
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def _expand(part: str, text: str) -> Iterator[str]:
    match = re.fullmatch(r"([^\[\]]*)\[([^\[\]]+)\](.*)", part)
    if match is None:
        if "[" in part or "]" in part:
            raise DistributedError(f"the list of nodes is {text!r}, expected a form like gpu[01-04]")
        yield part
        return
    prefix, ranges, rest = match.groups()
    for numbers in ranges.split(","):
        bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", numbers.strip())
        if bounds is None:
            raise DistributedError(f"the list of nodes is {text!r}, expected a form like gpu[01-04]")
        first, last = bounds[1], bounds[2] or bounds[1]
        for number in range(int(first), int(last) + 1):
            yield from _expand(f"{prefix}{number:0{len(first)}d}{rest}", text)
