"""Runs of models of true size: config files and a config.json."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from tests.unit.estimate.true_sizes import write_model

ROOT = Path(__file__).parents[3]


def write_run(directory: Path, name: str) -> Path:
    """A run file with the shipped configs, for one of `MODELS`; there is neither a processor nor data."""
    for folder in ("configs", "ds_configs"):
        shutil.copytree(ROOT / folder, directory / folder, dirs_exist_ok=True)
    model = directory / "models" / name
    entry = write_model(model, name)
    run = directory / "configs" / f"{name}.yaml"
    overrides = {
        "model": {"model_classes": {str(model): entry}},
        "data": {"train": [{"type": "tar", "path": "nowhere", "columns": {"image": "png"}}]},
        "train": {"report_to": "none"},
    }
    run.write_text(yaml.safe_dump({"model": str(model), "overrides": overrides}))
    return run
