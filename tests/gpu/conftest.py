"""Devices of the tests: the GPU (`-m gpu`), and the CPU, so that no test is first run on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def cuda(count: int = 1) -> Any:
    """A parameter that needs so many GPUs, and is skipped where they are not."""
    missing = torch.cuda.device_count() < count if torch.cuda.is_available() else True
    marks = [
        pytest.mark.gpu,
        pytest.mark.skipif(missing, reason=f"needs {count} CUDA device{'s' if count > 1 else ''}"),
    ]
    return pytest.param("cuda", marks=marks, id="cuda")


def needs_gpu(test: Any) -> Any:
    """For tests that have nothing to do on a CPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


@pytest.fixture(params=["cpu", cuda()])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Of what runs in this process."""
    return torch.device(request.param)


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.long), cuda()])
def place(request: pytest.FixtureRequest) -> str:
    """Of what starts processes, which takes long without a GPU."""
    return str(request.param)
