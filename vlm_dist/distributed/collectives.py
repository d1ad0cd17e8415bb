"""A debug mode in which the ranks compare every collective before they enter it."""

from __future__ import annotations

import os

import torch.distributed as dist


def compare_collectives() -> None:
    """Have every collective checked: same kind, same order, same shapes on all ranks, else an error on all of them.

    To be called before the process groups are made. Each collective costs another round over gloo, so it is for looking
    for a fault, not for training. Torch's own switch is a variable that is read when torch is imported, which is over.
    """
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
    dist.set_debug_level_from_env()  # type: ignore[attr-defined]
