"""slurm/train.sbatch with its marked lines edited, as its user does."""

from __future__ import annotations

import re
from pathlib import Path

from tests.tiny_run import ROOT, TinyRun


def edited_script(run: TinyRun, **lines: str | int) -> Path:
    """Copy the script into the run's directory, for the tests' cluster: two nodes of two ranks.

    Args:
        run: whose configs/tiny.yaml is trained.
        **lines: values of further #SBATCH options, such as time="0:02:00".
    """
    text = (ROOT / "slurm" / "train.sbatch").read_text()
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
        assert count == 1, f"slurm/train.sbatch has {count} lines of --{option}"
    text, count = re.subn(r"configs/run\.yaml", "configs/tiny.yaml", text)
    assert count == 1
    script = run.directory / "slurm" / "train.sbatch"
    script.parent.mkdir(exist_ok=True)
    script.write_text(text)
    return script
