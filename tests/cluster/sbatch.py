"""The scripts of slurm/ with their marked lines edited, as their user does."""

from __future__ import annotations

import re
from pathlib import Path

from tests.tiny_run import ROOT, TinyRun


def edited_script(run: TinyRun, name: str = "train.sbatch", **lines: str | int) -> Path:
    """Copy a script into the run's directory, for the tests' cluster: two nodes of two ranks.

    Args:
        run: whose configs/tiny.yaml is trained.
        name: of the script.
        **lines: values of further #SBATCH options, such as time="0:02:00".
    """
    text = (ROOT / "slurm" / name).read_text()
    edits: dict[str, str | int] = {
        "account": "students",
        "partition": "test",
        "nodes": 2,
        "gpus-per-node": 2,
        "ntasks-per-node": 2,
        "cpus-per-task": 2,
    }
    for option, value in (edits | {name.replace("_", "-"): value for name, value in lines.items()}).items():
        text, count = re.subn(rf"(?m)^(#SBATCH --{option}=)\S+", rf"\g<1>{value}", text)
        assert count == 1, f"slurm/{name} has {count} lines of --{option}"
    text, count = re.subn(r"(?m)^(RUN_FILE=.*)configs/run\.yaml", r"\g<1>configs/tiny.yaml", text)
    assert count == (name == "train.sbatch")
    script = run.directory / "slurm" / name
    script.parent.mkdir(exist_ok=True)
    script.write_text(text)
    return script
