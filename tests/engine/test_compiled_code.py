"""What torch.compile's own compiler makes of a block learns what the block learns."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.engine import tiny
from tests.engine.test_compiled_blocks import SHAPES, batch, check_same, forgotten, learn
from vlm_dist.model import compile_blocks, enable_gradient_checkpointing

pytestmark = pytest.mark.engine

__all__ = ["forgotten"]  # a fixture for every test here


@pytest.mark.skipif(shutil.which("g++") is None, reason="it needs a C++ compiler")
def test_generated_code_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    directory = tiny.save_tiny_vlm(tmp_path / "model")
    batches = [batch(2 * number, *shape) for number, shape in enumerate(SHAPES[:4])]
    found = []
    for is_compiled in (False, True):
        model = tiny.load_peft(directory).train()
        enable_gradient_checkpointing(model)
        if is_compiled:
            compile_blocks(model, "inductor")
        found.append(learn(model, batches))
    check_same(*found)
    assert list((tmp_path / "code").rglob("*.so"))
