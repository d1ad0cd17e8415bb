"""The machine that a benchmark ran on, and what its GPU does at most, measured."""

from __future__ import annotations

import os
import statistics
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from vlm_dist.model.devices import peak_flops

_PACKAGES = ("torch", "transformers", "deepspeed", "peft", "trl", "liger-kernel", "flash-attn", "kernels", "triton")
_SIDE = 8192
_COPIED_BYTES = 4 << 30


@dataclass(frozen=True)
class Machine:
    """Facts.

    Attributes:
        device: name.
        count: devices of this kind.
        memory_gib: of one; None without a GPU.
        peak_tflops: dense bfloat16, by the data sheet; None where nobody knows.
        measured_tflops: of a product of matrices of 8192 x 8192 in bfloat16 with random values.
        copied_gb_per_second: device to device, read and written bytes.
        cores: of the host.
        packages: versions of those that are there.
    """

    device: str
    count: int
    memory_gib: float | None
    peak_tflops: float | None
    measured_tflops: float | None
    copied_gb_per_second: float | None
    cores: int
    packages: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For a line of JSON."""
        return asdict(self)


def describe(device: torch.device) -> Machine:
    """Look at the machine; a GPU is measured, which takes a second."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    cores = os.cpu_count() or 1
    if device.type != "cuda":
        return Machine("cpu", 0, None, None, None, None, cores, packages)
    name = torch.cuda.get_device_name()
    peak = peak_flops(name)
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    product, copied = _product_seconds(device), _copy_seconds(device)
    torch.cuda.empty_cache()
    return Machine(
        device=name,
        count=torch.cuda.device_count(),
        memory_gib=memory,
        peak_tflops=None if peak is None else peak / 1e12,
        measured_tflops=2 * _SIDE**3 / product / 1e12,
        copied_gb_per_second=2 * _COPIED_BYTES / copied / 1e9,
        cores=cores,
        packages=packages,
    )


def _product_seconds(device: torch.device) -> float:
    left, right = (torch.randn(_SIDE, _SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    return median_seconds(lambda: torch.mm(left, right), device)


def _copy_seconds(device: torch.device) -> float:
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return median_seconds(lambda: target.copy_(source), device)


def median_seconds(work: Any, device: torch.device, repeats: int = 20) -> float:
    """Of a call on a GPU, by the device's own clock, after three calls to warm up.

    Args:
        work: queues something.
        device: that it queues on.
        repeats: that are timed.
    """
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)
