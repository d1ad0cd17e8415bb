"""All tests but those marked `gpu` run on CPU, on a GPU machine too: two ranks need no two GPUs."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs before torch looks for them, unless GPU tests alone were asked for."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["DS_ACCELERATOR"] = "cpu"
