"""The floors of the house: every contract holds, and every contract would notice a breach."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CONTRACTS = [
    contract["name"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
]

#: Contract -> a file, and an import that it must not have.
BREACHES = {
    "Floors": [
        ("vlm_dist/config/train.py", "import vlm_dist.data.plan.plan"),
        ("vlm_dist/data/plan/plan.py", "import vlm_dist.model"),
        ("vlm_dist/engine/engine.py", "import vlm_dist.checkpoint"),
        ("vlm_dist/trainer.py", "import vlm_dist.build"),
        ("vlm_dist/errors.py", "import vlm_dist.config"),
    ],
    "Only the engine": [("vlm_dist/trainer.py", "import deepspeed"), ("vlm_dist/data/feed.py", "import deepspeed")],
    "The config room": [("vlm_dist/config/train.py", "import torch")],
    "The launcher": [("launcher/deepspeed_cli.py", "import torch")],
}


def lint(directory: Path) -> str:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    ended = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120)
    return ended.stdout + ended.stderr


def copy_house(directory: Path) -> Path:
    for package in ("vlm_dist", "launcher"):
        shutil.copytree(ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", directory)
    return directory


def test_all_contracts_are_kept() -> None:
    report = lint(ROOT)
    assert f"Contracts: {len(CONTRACTS)} kept, 0 broken." in " ".join(report.split()), report


def test_every_contract_has_a_breach_below() -> None:
    assert [name for name in CONTRACTS if not any(name.startswith(key) for key in BREACHES)] == []


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_is_noticed(name: str, tmp_path: Path) -> None:
    for number, (file, line) in enumerate(BREACHES[name]):
        house = copy_house(tmp_path / str(number))
        path = house / file
        path.write_text(path.read_text() + f"\n{line}\n")
        report = " ".join(lint(house).split())
        contract = next(contract for contract in CONTRACTS if contract.startswith(name))
        assert f"{contract} BROKEN" in report, f"{file}: {line}\n{report}"
