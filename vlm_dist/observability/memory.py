"""Readings of memory."""

from __future__ import annotations

import sys

import psutil


def host_memory_bytes() -> int:
    """Resident memory of this process and of all processes below it (data workers, decoders).

    Pages that they share are counted once per process, so that it is an upper bound.
    """
    process = psutil.Process()
    total = int(process.memory_info().rss)
    for child in process.children(recursive=True):
        try:
            total += int(child.memory_info().rss)
        except psutil.Error:
            continue  # it ended between the listing and the reading
    return total


def device_memory_bytes() -> int | None:
    """Most memory that tensors had on the current CUDA device since the last call; None without CUDA."""
    torch = sys.modules.get("torch")  # who has not imported torch has no tensors
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    peak = int(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return peak
