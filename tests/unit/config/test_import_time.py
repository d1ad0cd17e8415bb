"""`import vlm_dist.config` stays light: it is what a login node and `vlm-dist --help` wait for.

Not a timed test, which would fail on a busy machine: what costs time is what is imported (0.13 s with the modules of
today).
"""

import subprocess
import sys

import pytest

from tests.unit.config.conftest import REPOSITORY

HEAVY = {"torch", "transformers", "deepspeed", "peft", "numpy", "datasets", "pyarrow", "PIL", "rich", "wandb"}
MAX_MODULES = 400  # 290 today, the interpreter's own included


@pytest.mark.parametrize("module", ["vlm_dist.config", "vlm_dist.cli", "launcher.deepspeed_cli"])
def test_import_is_light(module: str) -> None:
    probe = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", probe], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    imported = result.stdout.split()
    assert {name.split(".")[0] for name in imported} & HEAVY == set()
    assert len(imported) < MAX_MODULES, len(imported)
