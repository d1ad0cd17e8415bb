"""Process groups: one for the model's tensors, one gloo group for decisions.

Decisions (who failed, which checkpoint, shall we stop) travel over a gloo group of CPU tensors of their own, so that
they neither wait for nor disturb the device's queue of collectives.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vlm_dist.distributed.environment import Topology
from vlm_dist.distributed.progress import Progress
from vlm_dist.distributed.signals import AskedToStop, StopRequest, describe_stop
from vlm_dist.errors import DistributedError, ExitCode

T = TypeVar("T")

#: A rank that waits longer than this for another one gives up. Minutes, not the years that hide a hang.
DEFAULT_TIMEOUT = timedelta(minutes=15)


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, after the process groups exist."""

    topology: Topology
    control: dist.ProcessGroup  # gloo: decisions and objects
    agreement: dist.ProcessGroup  # gloo: the one agreement per step, which another thread may start
    stop: StopRequest = field(default_factory=StopRequest, compare=False)  # of this process
    progress: Progress = field(default_factory=Progress, compare=False)  # of this process

    @property
    def rank(self) -> int:
        """Rank of this process over all nodes."""
        return self.topology.rank

    @property
    def world_size(self) -> int:
        """Number of processes over all nodes."""
        return self.topology.world_size

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks. Collective: every rank calls this."""
        dist.barrier(group=self.control)

    def gather_objects(self, value: T) -> list[T]:
        """One small picklable value per rank, in rank order, on every rank. Collective: every rank calls this."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast_object(self, value: T | None) -> T:
        """Rank 0's value on every rank. Collective: every rank calls this."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]  # type: ignore[return-value]

    def leave_if_asked(self) -> None:
        """Leave on all ranks if any was asked to stop. Collective: every rank calls this.

        Raises:
            AskedToStop: on every rank.
        """
        numbers = self.gather_objects(self.stop.number)
        if any(numbers):
            raise AskedToStop(describe_stop(numbers))

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes. Collective: every rank calls this."""
        votes = torch.tensor([int(flag)])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.control)
        return bool(votes.item())


def free_port() -> int:
    """A TCP port that is free on the loopback interface now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def init_process_groups(
    topology: Topology, timeout: timedelta = DEFAULT_TIMEOUT, stop: StopRequest | None = None
) -> Ranks:
    """Create the process groups. Collective: every rank calls this.

    Args:
        topology: who we are; its values are written to the variables that torch and DeepSpeed read.
        timeout: of every collective, rendezvous included.
        stop: listens to this process's signals; None: nothing does.

    Raises:
        DistributedError: the ranks did not find each other.
    """
    if topology.rendezvous is not None:
        os.environ.update(MASTER_ADDR=topology.rendezvous[0], MASTER_PORT=str(topology.rendezvous[1]))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    # torchrun's agent listens at its own port, where torch looks for it whatever the port says: another would hang
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and "MASTER_PORT" in os.environ
    if topology.world_size == 1 and not is_served:
        # Nobody else has to know the port, so that any number of single-process runs share a machine.
        os.environ["MASTER_PORT"] = str(free_port())
    os.environ.update(
        RANK=str(topology.rank),
        WORLD_SIZE=str(topology.world_size),
        LOCAL_RANK=str(topology.local_rank),
        LOCAL_WORLD_SIZE=str(topology.local_world_size),
    )
    device_id = None
    backend = "gloo"
    # DeepSpeed's own variable: it would run on the CPU while NCCL waits for GPUs
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        num_devices = torch.cuda.device_count()
        if topology.local_world_size > num_devices:
            raise DistributedError(
                f"{topology.local_world_size} processes were started on this node, which has {num_devices} GPU(s); "
                f"start at most {num_devices} (deepspeed --num_gpus {num_devices}; for sbatch --gpus-per-node, "
                "since --gpus-per-task shows each task one GPU alone)"
            )
        device_id = torch.device("cuda", topology.local_rank)
        torch.cuda.set_device(device_id)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
        if topology.rank == 0 and "EADDRINUSE" in str(error):
            raise DistributedError(
                f"{address} is taken by another program on this machine, probably another run, so that the ranks "
                "cannot meet there; choose another: deepspeed --master_port, torchrun --master-port, or MASTER_PORT"
            ) from error
        raise DistributedError(
            f"rank {topology.rank} of {topology.world_size} could not join the others at {address}: {error}. "
            "Check that all ranks were started, and that MASTER_ADDR and MASTER_PORT are the same everywhere and free."
        ) from error
    control, agreement = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    assert isinstance(control, dist.ProcessGroup)
    assert isinstance(agreement, dist.ProcessGroup)
    ranks = Ranks(topology, control, agreement, StopRequest() if stop is None else stop)
    ranks.stop.met()
    return ranks


class LostPeerError(DistributedError):
    """A collective failed because another rank left or did not answer in time.

    Args:
        message: for the user.
        exit_code: that of the rank which failed, where it is known.
    """

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.DISTRIBUTED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank left or did not answer in time.

    NCCL's and the store's errors have types of their own; gloo's are plain, but name their source file.
    """
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def shut_down() -> None:
    """End the process groups; harmless where there are none."""
    if dist.is_initialized():
        dist.destroy_process_group()
