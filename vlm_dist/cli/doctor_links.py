"""How fast the ranks reach each other, how far their clocks are apart, and whether they see one file system."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from vlm_dist.distributed.group import Ranks

#: A message that is sent in less than this is too small to measure the bandwidth with.
_LONG_ENOUGH_SECONDS = 0.05
_FIRST_BYTES = 1 << 20
_ROUNDS = 3
#: Pairs of nodes that are measured one after the other; more would not be done within a minute.
MAX_PAIRS = 16


@dataclass(frozen=True)
class Links:
    """What was measured. Rates are bytes per second in each direction.

    Attributes:
        backend: nccl or gloo.
        inside: node -> all-reduce between its ranks; empty with one rank on each.
        pairs: node -> all-reduce between it and the first node, one rank each.
        across: all-reduce over all nodes, one rank each; None with one node.
        clock_seconds: node -> how far its clock is ahead of the first node's.
        unseen: nodes that do not see a file that the first node wrote.
    """

    backend: str
    inside: dict[str, float]
    pairs: dict[str, float]
    across: float | None
    clock_seconds: dict[str, float]
    unseen: tuple[str, ...]


def measure_links(ranks: Ranks, hosts: list[str], shared: Path) -> Links:
    """Measure, on all ranks. Collective: every rank calls this.

    Args:
        ranks: of this process.
        hosts: node of every rank; the ranks of a node are neighbours.
        shared: a directory that all nodes should see.
    """
    import torch
    import torch.distributed as dist

    is_cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", ranks.topology.local_rank) if is_cuda else torch.device("cpu")
    largest = 256 << 20 if is_cuda else 16 << 20
    nodes = list(dict.fromkeys(hosts))
    members = {node: [rank for rank, host in enumerate(hosts) if host == node] for node in nodes}
    firsts = [members[node][0] for node in nodes]

    def measure(group_ranks: list[int]) -> float:
        # all ranks make every group, in the same order
        group = dist.new_group(group_ranks, backend="nccl" if is_cuda else "gloo")
        rate = 0.0
        if ranks.rank in group_ranks:
            assert isinstance(group, dist.ProcessGroup)
            rate = _all_reduce_rate(group, len(group_ranks), device, largest)
            dist.destroy_process_group(group)
        ranks.barrier()
        return max(ranks.gather_objects(rate))

    clocks = _clocks(ranks)
    inside = {node: measure(members[node]) for node in nodes[:MAX_PAIRS] if len(members[node]) > 1}
    across = measure(firsts) if len(nodes) > 1 else None
    pairs = (
        {node: measure([firsts[0], members[node][0]]) for node in nodes[1 : MAX_PAIRS + 1]} if len(nodes) > 2 else {}
    )
    return Links(
        backend="nccl" if is_cuda else "gloo",
        inside=inside,
        pairs=pairs,
        across=across,
        clock_seconds={node: clocks[members[node][0]] - clocks[0] for node in nodes},
        unseen=_unseen(ranks, hosts, shared),
    )


def _all_reduce_rate(group: dist.ProcessGroup, num_ranks: int, device: torch.device, largest: int) -> float:
    """Bytes that each rank sends per second; larger messages until one takes long enough."""
    import torch
    import torch.distributed as dist

    def seconds(data: torch.Tensor) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(_ROUNDS):
            dist.all_reduce(data, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = torch.tensor([time.perf_counter() - began], dtype=torch.float64, device=device)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=group)  # all go on, or none
        return float(taken.item()) / _ROUNDS

    size = _FIRST_BYTES
    seconds(torch.zeros(size // 4, device=device))  # connections are made by the first one
    while True:
        taken = seconds(torch.zeros(size // 4, device=device))
        if taken >= _LONG_ENOUGH_SECONDS or size >= largest:
            return 2 * (num_ranks - 1) / num_ranks * size / taken
        size = min(size * 4, largest)


def _clocks(ranks: Ranks) -> list[float]:
    """Every rank's time at about the same moment: as they leave a barrier."""
    ranks.barrier()
    ranks.barrier()  # the first one waited for whoever was late
    return ranks.gather_objects(time.time())


def _unseen(ranks: Ranks, hosts: list[str], shared: Path) -> tuple[str, ...]:
    """Nodes that do not find what rank 0 has written."""
    name: str | None = None
    if ranks.is_main:
        try:
            handle, name = tempfile.mkstemp(prefix=f".vlm-dist-doctor-{uuid.uuid4().hex[:8]}-", dir=shared)
            os.close(handle)
        except OSError:
            name = ""  # told by the check of the directory itself
    name = ranks.broadcast_object(name)
    sees = not name or _appears(Path(name))
    votes: list[Any] = ranks.gather_objects(sees)
    if ranks.is_main and name:
        Path(name).unlink(missing_ok=True)
    return tuple(dict.fromkeys(host for host, vote in zip(hosts, votes, strict=True) if not vote))


def _appears(path: Path, seconds: float = 5.0) -> bool:
    """Whether a file is there; NFS may know for a while that it was not."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
