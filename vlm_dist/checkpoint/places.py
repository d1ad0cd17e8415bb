"""Who writes: rank 0 where all nodes see one output directory, else the first rank of every node, each a copy."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vlm_dist.distributed.failures import agree_on_failure
from vlm_dist.distributed.group import Ranks
from vlm_dist.errors import ConfigError

#: How long a network file system may take to show a new file on another node.
PATIENCE_SECONDS = 3.0


@dataclass(frozen=True)
class Places:
    """Where the checkpoints of a run are.

    Attributes:
        writers: ranks that write, rank 0 first.
        hosts: name of each writer's node.
        is_writer: whether this rank is one of them.
        group: of the writers, to give them the state; None with rank 0 alone. Opaque outside the group.
    """

    writers: tuple[int, ...] = (0,)
    hosts: tuple[str, ...] = ("",)
    is_writer: bool = False
    group: Any = field(default=None, repr=False)

    @property
    def are_copies(self) -> bool:
        """Whether there is more than one."""
        return len(self.writers) > 1

    def name(self, rank: int) -> str:
        """A writer, for messages."""
        return f"rank {rank} ({self.hosts[self.writers.index(rank)]})"


def find_places(output_dir: Path, ranks: Ranks) -> Places:
    """Create the output directory, and find out which nodes share it. Collective: every rank calls this.

    Rank 0 leaves a file there, and the first rank of each other node looks for it.

    Raises:
        ConfigError: on every rank: the directory cannot be written on one of the nodes.
    """
    token = ranks.broadcast_object(secrets.token_hex(8) if ranks.is_main else None)
    mark = output_dir / f".seen-by-all-nodes-{token}"
    with agree_on_failure(ranks):
        if ranks.is_main:
            _leave(mark)
    try:
        is_first = ranks.topology.local_rank == 0
        is_alone = is_first and not ranks.is_main and not _is_seen(mark)
        found = ranks.gather_objects((socket.gethostname(), is_alone))
    finally:
        if ranks.is_main:
            with contextlib.suppress(OSError):
                mark.unlink()
    with agree_on_failure(ranks):
        if is_alone:
            _leave(mark)
            mark.unlink()
    writers = tuple(rank for rank, (_, needs_copy) in enumerate(found) if rank == 0 or needs_copy)
    group = dist.new_group(list(writers), backend="gloo") if len(writers) > 1 else None
    return Places(writers, tuple(found[rank][0] for rank in writers), ranks.rank in writers, group)


def _leave(mark: Path) -> None:
    """Write the file; where that works, checkpoints can be written, too."""
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise ConfigError(
            f"train.output_dir: cannot write to {mark.parent}: {error.strerror}; name a directory that can be written"
        ) from error


def _is_seen(mark: Path) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not os.path.exists(mark):  # noqa: PTH110 - pathlib's raises where this rank may not look
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
