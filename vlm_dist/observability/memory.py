"""Readings of memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class DeviceMemory:
    """The most that a device had given since the last reading, in bytes.

    Attributes:
        allocated: to tensors.
        reserved: to the process's allocator, tensors and what lies between them.
    """

    allocated: int
    reserved: int


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


def device_memory() -> DeviceMemory | None:
    """Of the current CUDA device, since the last call; None without CUDA."""
    torch = sys.modules.get("torch")  # who has not imported torch has no tensors
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    peaks = DeviceMemory(int(torch.cuda.max_memory_allocated()), int(torch.cuda.max_memory_reserved()))
    torch.cuda.reset_peak_memory_stats()
    return peaks
