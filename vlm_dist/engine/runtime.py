"""DeepSpeed's own start: quiet, without a compiler, on top of the process groups that exist already."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from vlm_dist.errors import DistributedError


def prepare_deepspeed() -> None:
    """Import DeepSpeed without what costs time or buries our messages. Needs no process group.

    On CPU its communication backend compiles a shared-memory kernel when it starts (34 s alone, 80-99 s on a loaded
    machine), for nothing that we use: gloo carries our collectives.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for one, and warns that it found none
    import deepspeed

    if not os.environ.get("DS_LOG_LEVEL"):
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        deepspeed.utils.logger.setLevel(logging.WARNING)
    # import_module, because the attribute deepspeed.comm.torch is torch itself
    backend: Any = import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None


def init_deepspeed_comm(timeout: timedelta = timedelta(minutes=15)) -> None:
    """Let DeepSpeed use torch's process group. Collective: every rank calls this; calling it again does nothing.

    Args:
        timeout: of DeepSpeed's own collectives; those of the existing process group keep theirs.

    Raises:
        DistributedError: torch.distributed is not initialised. `init_process_groups` does that, and it sets the
            variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which DeepSpeed reads.
    """
    if not dist.is_initialized():
        raise DistributedError(
            "DeepSpeed was started before the process groups exist; call init_process_groups() first"
        )
    prepare_deepspeed()
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(verbose=False, timeout=timeout)
