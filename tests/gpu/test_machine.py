"""The table of GPUs against the GPU that is here."""

from __future__ import annotations

import torch

from tests.bench.gpu.machine import describe
from tests.gpu.conftest import needs_gpu


@needs_gpu
def test_the_peak_of_this_gpu_is_known_and_not_exceeded() -> None:
    found = describe(torch.device("cuda"))
    assert found.peak_tflops is not None, f"vlm_dist/model/devices.py has no row for {found.device}"
    assert found.measured_tflops is not None
    assert 0.3 * found.peak_tflops < found.measured_tflops < 1.02 * found.peak_tflops


def test_a_machine_without_a_gpu_is_described() -> None:
    found = describe(torch.device("cpu"))
    assert found.count == 0 and found.peak_tflops is None and "torch" in found.packages
