"""What most of these tests begin with: the imports, done once, and a directory with a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.preloaded import Preloaded, preloaded
from tests.tiny_run import TinyRun


@pytest.fixture(scope="session")
def process() -> Iterator[Preloaded]:
    """Every command is a fresh fork of it, so all files may share it."""
    with preloaded() as started:
        yield started


@pytest.fixture(scope="module")
def empty_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyRun]:
    """The tiny model in float32 and the shipped configs, without data; the current directory."""
    import torch

    from tests.tiny_run import SHAPE, write_configs
    from vlm_dist.demo.tiny_model import save_tiny_qwen2_vl

    directory = tmp_path_factory.mktemp("run")
    save_tiny_qwen2_vl(directory / "model", SHAPE, dtype=torch.float32)
    write_configs(directory, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        yield TinyRun(directory)
