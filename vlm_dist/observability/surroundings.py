"""Where a process runs: versions, devices, command line, commit. Nothing of it is secret."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from vlm_dist import __version__
from vlm_dist.config.masking import masked

#: Whose versions decide what is computed, or what is read.
PACKAGES = (
    *("torch", "torchvision", "transformers", "peft", "deepspeed", "accelerate", "datasets", "webdataset"),
    *("safetensors", "numpy", "pillow", "decord", "bitsandbytes", "flash-attn", "triton"),
)
#: Of the job that the process belongs to.
_JOB_VARIABLES = ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID")


def process_facts() -> dict[str, Any]:
    """Of the process that writes: by `pid` and `process_started` (Unix seconds) it is known again on its host."""
    me = psutil.Process()
    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "pid": me.pid,
        "process_started": round(me.create_time(), 2),
        "command": command_line(sys.orig_argv),
        "working_directory": str(Path.cwd()),
        "platform": platform.platform(),
        "versions": versions(),
        "cuda": torch.version.cuda,
        "commit": commit_of(Path(__file__).resolve().parent.parent.parent),
        "job": {name: os.environ[name] for name in _JOB_VARIABLES if os.environ.get(name)},
    }
    return {name: value for name, value in facts.items() if value not in (None, {}, "")}


def rank_facts() -> dict[str, Any]:
    """Of every rank: its host and its device."""
    facts: dict[str, Any] = {"host": socket.gethostname(), "device": "cpu"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {"device": properties.name, "device_memory_bytes": properties.total_memory}
    return facts


def versions() -> dict[str, str]:
    """Of Python, of ourselves and of the packages that are there."""
    found = {"python": platform.python_version(), "vlm-dist": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def command_line(arguments: Sequence[str]) -> str:
    """A command as one would type it, without secrets."""
    mark = "pipe:"  # of commands: all rules of `masked` hold for them
    return masked(mark + shlex.join(arguments)).removeprefix(mark)


def commit_of(directory: Path) -> str | None:
    """The git commit that a working tree stands at; None where it is none, or it cannot be told from its files."""
    try:
        head = (directory / ".git" / "HEAD").read_text(encoding="ascii").strip()
        if not head.startswith("ref: "):
            return head or None
        name = head.removeprefix("ref: ")
        loose = directory / ".git" / name
        if loose.is_file():
            return loose.read_text(encoding="ascii").strip() or None
        for line in (directory / ".git" / "packed-refs").read_text(encoding="ascii").splitlines():
            commit, _, reference = line.partition(" ")
            if reference == name:
                return commit
    except (OSError, ValueError):
        return None
    return None
