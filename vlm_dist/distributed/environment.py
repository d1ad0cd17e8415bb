"""Who am I? Rank and world size from what the launcher left in the environment.

Four launchers are understood: none (`python -m vlm_dist.train`), `deepspeed`, `torchrun` and `srun`, each also inside
`sbatch` and `salloc`. The answer is either certain or an error that names the variables: a process that takes itself
for rank 0 of 1 by mistake trains alone, and overwrites what the others write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from vlm_dist.distributed.rendezvous import meeting_point
from vlm_dist.errors import DistributedError

Launcher = Literal["python", "deepspeed", "torchrun", "slurm", "environment"]

#: Every launcher but srun sets these three; none of them, or all.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
#: srun sets these for every task; the batch script has some of them too, but never a step id.
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
SLURM_STEP_VARIABLES = ("SLURM_STEP_ID", "SLURM_STEPID")
#: Ids of steps that srun did not start, from here on (slurm.h): the shell of salloc, the batch script, what ssh opens.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
#: How many processes another launcher of MPI programs has started.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
LOOPBACK_ADDRESSES = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Topology:
    """This process among its peers, before any process group exists.

    Attributes:
        rank: of this process over all nodes, from 0.
        world_size: number of processes over all nodes.
        local_rank: of this process on its node, from 0; picks the device.
        local_world_size: number of processes on this node.
        launcher: who started the process; `environment` where somebody set the variables by hand.
        rendezvous: address and port at which the ranks meet; None: one process, which tells nobody.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: Launcher
    rendezvous: tuple[str, int] | None = field(default=None, compare=False)

    @property
    def has_several_nodes(self) -> bool:
        """Whether there are processes on other nodes, too."""
        return self.world_size > self.local_world_size

    def __post_init__(self) -> None:
        if self.local_world_size > self.world_size:
            raise DistributedError(
                f"LOCAL_WORLD_SIZE {self.local_world_size} is larger than WORLD_SIZE {self.world_size}; {_how_to_fix()}"
            )
        for name, value, size_name, size in (
            ("RANK", self.rank, "WORLD_SIZE", self.world_size),
            ("LOCAL_RANK", self.local_rank, "LOCAL_WORLD_SIZE", self.local_world_size),
        ):
            if not 0 <= value < size:
                raise DistributedError(
                    f"{name} is {value}, expected 0 to {size - 1} as {size_name} is {size}; {_how_to_fix()}"
                )


def resolve_topology(environ: Mapping[str, str]) -> Topology:
    """Find this process's place from its environment; changes nothing.

    Args:
        environ: usually `os.environ`.

    Raises:
        DistributedError: the variables are half set, not numbers, or contradict each other.
    """
    given = [name for name in RANK_VARIABLES if environ.get(name)]
    if given:
        return _from_rank_variables(environ, given)
    if in_slurm_step(environ):
        return _from_slurm(environ)
    _refuse_mpirun(environ)
    _refuse_batch_script(environ)
    return Topology(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="python")


def in_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process, or one of its parents, as a task."""
    step = next((environ[name] for name in SLURM_STEP_VARIABLES if environ.get(name)), None)
    if step is None or not environ.get("SLURM_PROCID"):
        return False
    return not (step.isdigit() and int(step) >= _FIRST_SPECIAL_STEP)


def _from_rank_variables(environ: Mapping[str, str], given: list[str]) -> Topology:
    _require(environ, RANK_VARIABLES, f"go together, and {_listed(environ, given)} is set")
    launcher: Launcher = "environment"
    if environ.get("TORCHELASTIC_RUN_ID"):
        launcher = "torchrun"
    elif environ.get("LOCAL_SIZE") and environ.get("CROSS_SIZE"):
        launcher = "deepspeed"
    elif in_slurm_step(environ):
        launcher = "slurm"
        _refuse_contradiction(environ)
    rank, world_size, local_rank = (_integer(environ, name) for name in RANK_VARIABLES)
    local_world_size = _local_world_size(environ, world_size, launcher)
    if launcher in ("torchrun", "deepspeed") and local_world_size == world_size:
        _refuse_launcher_per_task(environ, launcher)
    rendezvous = _rendezvous(environ, world_size, launcher)
    return Topology(rank, world_size, local_rank, local_world_size, launcher, rendezvous)


def _from_slurm(environ: Mapping[str, str]) -> Topology:
    _require(environ, SLURM_VARIABLES, "are set by srun for every task; it seems that something removed them")
    if environ.get("SLURM_HET_SIZE", "1") != "1":
        raise DistributedError(
            f"{_listed(environ, ['SLURM_HET_SIZE'])}: the parts of a heterogeneous job count their tasks each from 0; "
            "use one kind of node, or start torchrun on every node with --nnodes and --node-rank"
        )
    rank, world_size, local_rank = (_integer(environ, name) for name in SLURM_VARIABLES)
    if environ.get("SLURM_STEP_NUM_TASKS"):  # of this step: with --export=NONE the other may still be the job's
        world_size = _integer(environ, "SLURM_STEP_NUM_TASKS")
    rendezvous = _rendezvous(environ, world_size, "slurm")
    local_world_size = _local_world_size(environ, world_size, "slurm")
    return Topology(rank, world_size, local_rank, local_world_size, "slurm", rendezvous)


def _rendezvous(environ: Mapping[str, str], world_size: int, launcher: Launcher) -> tuple[str, int] | None:
    if world_size == 1:
        return None
    if launcher == "slurm" and not environ.get("MASTER_ADDR") and not environ.get("MASTER_PORT"):
        return meeting_point(environ)
    # one without the other was meant for something else
    _require(environ, ("MASTER_ADDR", "MASTER_PORT"), f"are needed as there are {world_size} processes")
    port = _integer(environ, "MASTER_PORT")
    if not 0 < port < 65536:
        raise DistributedError(f"MASTER_PORT is {port}, expected 1 to 65535; {_how_to_fix()}")
    return environ["MASTER_ADDR"], port


def _local_world_size(environ: Mapping[str, str], world_size: int, launcher: Launcher) -> int:
    # Each launcher's own variable first: one of another launcher may have been inherited from an outer one.
    names = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE") if launcher == "deepspeed" else ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    if launcher == "environment" and all(environ.get(name) for name in names):
        one, other = (_integer(environ, name) for name in names)
        if one != other:
            raise DistributedError(
                f"{_listed(environ, list(names))}: they contradict each other; unset the one that is left over"
            )
    for name in names:
        if environ.get(name):
            return _integer(environ, name)
    if launcher == "slurm":
        return _slurm_tasks_on_this_node(environ, world_size)
    if world_size == 1 or environ.get("MASTER_ADDR") in LOOPBACK_ADDRESSES:
        return world_size
    raise DistributedError(
        f"LOCAL_WORLD_SIZE is not set, and {_listed(environ, ['WORLD_SIZE', 'MASTER_ADDR'])} does not tell how many "
        f"processes this node has; {_how_to_fix()}"
    )


def _slurm_tasks_on_this_node(environ: Mapping[str, str], world_size: int) -> int:
    """Read "4(x2),3" (two nodes of 4 tasks, then one of 3) at this node's place."""
    name = next((n for n in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE") if environ.get(n)), None)
    if name is None:
        if world_size == 1:
            return 1
        raise DistributedError("SLURM_STEP_TASKS_PER_NODE is not set, though this process was started by srun")
    counts: list[int] = []
    for part in environ[name].split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise DistributedError(f"{name} is {environ[name]!r}, expected a form like 8(x4) or 8,4")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _integer(environ, "SLURM_NODEID") if environ.get("SLURM_NODEID") else 0
    if node >= len(counts):
        raise DistributedError(f"{_listed(environ, ['SLURM_NODEID', name])}: there is no such node in the list")
    return counts[node]


def _refuse_contradiction(environ: Mapping[str, str]) -> None:
    """In a Slurm step, RANK and friends set by hand must be the task's own."""
    for name, slurm_name in zip(RANK_VARIABLES, SLURM_VARIABLES, strict=True):
        if environ.get(slurm_name) and _integer(environ, name) != _integer(environ, slurm_name):
            raise DistributedError(
                f"{_listed(environ, [name, slurm_name])}: they contradict each other. {name} was exported before srun, "
                f"so that every task has the same value; unset {', '.join(RANK_VARIABLES)} in the batch script"
            )


def _refuse_launcher_per_task(environ: Mapping[str, str], launcher: Launcher) -> None:
    """`srun --ntasks=8 deepspeed …` starts the launcher 8 times: 8 runs that know nothing of each other."""
    if not in_slurm_step(environ) or not environ.get("SLURM_STEP_NUM_TASKS"):
        return
    if (tasks := _integer(environ, "SLURM_STEP_NUM_TASKS")) > 1:
        raise DistributedError(
            f"{_listed(environ, ['SLURM_STEP_NUM_TASKS', 'WORLD_SIZE'])}: srun has started {launcher} {tasks} times, "
            "and each of them would train alone. Start python -m vlm_dist.train with srun, one task per GPU, or "
            "torchrun with --nnodes and --rdzv-endpoint, one task per node"
        )


def _refuse_mpirun(environ: Mapping[str, str]) -> None:
    for name in _MPI_SIZES:
        if environ.get(name) and _integer(environ, name) > 1:
            raise DistributedError(
                f"{_listed(environ, [name])}, but {', '.join(RANK_VARIABLES)} are not set: every process of mpirun "
                "would train alone; start with deepspeed, torchrun or srun instead"
            )


def _refuse_batch_script(environ: Mapping[str, str]) -> None:
    """A batch script that forgot srun: one process would train, and the other GPUs of the job stand idle.

    The shell of salloc is left alone: there one process is what somebody debugs.
    """
    if not environ.get("SLURM_JOB_ID") or not environ.get("SLURM_PROCID") or _has_step_id(environ):
        return
    for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES"):
        if environ.get(name) and _integer(environ, name) > 1:
            raise DistributedError(
                f"{_listed(environ, [name])}, and this is the batch script itself, which runs once: write "
                "`srun python -m vlm_dist.train …` (as slurm/train.sbatch does). For one process in this job: "
                f"unset {name}"
            )


def _has_step_id(environ: Mapping[str, str]) -> bool:
    return any(environ.get(name) for name in SLURM_STEP_VARIABLES)


def _require(environ: Mapping[str, str], names: tuple[str, ...], reason: str) -> None:
    missing = [name for name in names if not environ.get(name)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise DistributedError(f"{', '.join(missing)} {verb} not set: {', '.join(names)} {reason}; {_how_to_fix()}")


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise DistributedError(f"{name} is {environ[name]!r}, expected a whole number; {_how_to_fix()}") from None


def _listed(environ: Mapping[str, str], names: list[str]) -> str:
    return ", ".join(f"{name}={environ.get(name, '')}" for name in names)


def _how_to_fix() -> str:
    return (
        "start with deepspeed, torchrun or slurm/train.sbatch, which set all of them, or unset "
        f"{', '.join(RANK_VARIABLES)} to run one process"
    )
