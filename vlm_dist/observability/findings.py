"""What an examination finds: how bad, where, what, and how to mend it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from vlm_dist.errors import ExitCode

_WIDTH = 110


class Level(IntEnum):
    """How bad; the order of the table."""

    PROBLEM = 0
    WARNING = 1
    NOTICE = 2
    OK = 3


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        level: how bad.
        what: which check.
        found: what was found.
        fix: what to do; empty where nothing is, or where `found` says it.
        details: lines of a table of its own, shown below all rows.
        exit_code: of the command, where this is a problem.
    """

    level: Level
    what: str
    found: str
    fix: str = ""
    details: str = ""
    exit_code: ExitCode = ExitCode.FAILURE

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "level": self.level.name.lower(),
            "what": self.what,
            "found": self.found,
            "fix": self.fix,
            "details": self.details.splitlines(),
        }


def format_table(findings: Sequence[Finding], title: str) -> str:
    """One row per finding, worst first, and its fix below it.

    Args:
        findings: in any order; those of one level stay in theirs.
        title: of the table; how many problems and warnings there are follows it.
    """
    ranked = sorted(findings, key=lambda finding: finding.level)
    counts = {level: sum(finding.level is level for finding in ranked) for level in (Level.PROBLEM, Level.WARNING)}
    said = ", ".join(f"{count} {level.name.lower()}{'' if count == 1 else 's'}" for level, count in counts.items())
    lines = [f"{title}: {said}"]
    width = min(max((len(finding.what) for finding in ranked), default=0), 32)
    for finding in ranked:
        level = finding.level.name if finding.level in counts else finding.level.name.lower()
        first, *rest = finding.found.splitlines() or [""]
        lines.append(f"{level:8} {finding.what:{width}}  {first}".rstrip())
        lines += [" " * (11 + width) + line for line in rest]
        if finding.fix:
            lines += textwrap.wrap(f"-> {finding.fix}", _WIDTH, initial_indent=" " * 9, subsequent_indent=" " * 12)
    return "\n".join(lines)


def size_text(num_bytes: float) -> str:
    """Bytes for people, in the unit that fits."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} bytes" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.2f} GiB"


def exit_code(findings: Sequence[Finding]) -> ExitCode:
    """Of a command: that of the first stage that has a problem."""
    return next((finding.exit_code for finding in findings if finding.level is Level.PROBLEM), ExitCode.DONE)
