"""What every benchmark prints and writes: JSON lines, a summary, and a Markdown page."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Figure:
    """One measured value.

    Attributes:
        name: of what was measured.
        value: rounded where it is printed.
        unit: of the value.
        aim: the most that it may be; None: no aim.
        peer: who the value is compared with, if anybody.
        peer_value: the same figure of the peer.
        ratio: how many times as good as the peer.
        ratio_aim: the least that this may be; None: no aim.
    """

    name: str
    value: float
    unit: str
    aim: float | None = None
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    ratio_aim: float | None = None

    @property
    def has_aim(self) -> bool:
        """Whether something is aimed at."""
        return self.aim is not None or self.ratio_aim is not None

    @property
    def is_met(self) -> bool:
        """Whether the value is what it should be."""
        if self.ratio_aim is not None and (self.ratio is None or self.ratio < self.ratio_aim):
            return False
        return self.aim is None or self.value <= self.aim

    @property
    def line(self) -> dict[str, Any]:
        """What is printed."""
        line: dict[str, Any] = {"name": self.name, "value": float(f"{self.value:.6g}"), "unit": self.unit}
        if self.peer is not None and self.peer_value is not None and self.ratio is not None:
            line |= {"peer": self.peer, "peer_value": float(f"{self.peer_value:.6g}"), "ratio": round(self.ratio, 3)}
        if self.aim is not None:
            line["aim"] = f"<= {self.aim:g}"
        if self.ratio_aim is not None:
            line["aim"] = f"ratio >= {self.ratio_aim:g}"
        return line


class Report:
    """Prints figures as they come, and keeps them for the page."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []

    def add(self, name: str, value: float, unit: str, aim: float | None = None, **compared: Any) -> None:
        """Print one figure; `compared` are the other attributes of `Figure`."""
        figure = Figure(name, value, unit, aim, **compared)
        self.figures.append(figure)
        print(json.dumps(figure.line), flush=True)

    def summarise(self) -> None:
        """Print the last line."""
        with_aim = [figure for figure in self.figures if figure.has_aim]
        met = [figure.name for figure in with_aim if figure.is_met]
        missed = [figure.name for figure in with_aim if not figure.is_met]
        print(json.dumps({"summary": {"met": met, "missed": missed}}), flush=True)

    def find(self, name: str) -> Figure:
        """Return a figure."""
        return next(figure for figure in self.figures if figure.name == name)


def write_page(path: Path, title: str, command: str, packages: Sequence[str], body: str) -> None:
    """Write the page of a benchmark: what was measured with what, then the body."""
    versions = ", ".join(["Python " + platform.python_version(), *(f"{name} {version(name)}" for name in packages)])
    lines = [
        f"# {title}",
        "",
        f"Made by `{command}` at commit {_commit()}, on {os.cpu_count()} cores ({_processor()}); {versions}.",
        "",
        body.strip(),
        "",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")


def _commit() -> str:
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
