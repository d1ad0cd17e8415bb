"""The table of docs/models.md, made by the tests that prove it.

python -m tests.unit.families.page     # writes it anew
"""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path

from tests.unit.families.cells import CELLS
from tests.unit.families.subjects import Subject, subject
from tests.unit.families.zoo import CHECKPOINTS
from tests.unit.families.zoo.originals import ORIGINALS
from vlm_dist.errors import ConfigError

PAGE = Path(__file__).resolve().parents[3] / "docs" / "models.md"
_BEGIN, _END = "<!-- table: begin -->\n", "<!-- table: end -->\n"

#: The rows of the table.
FAMILIES_SHOWN = (*(name for name in CHECKPOINTS if name != "mllama"), *ORIGINALS)

#: What is written in a cell, and why it is not "yes".
Outcome = tuple[str, str]


def try_cell(one: Subject, column: str) -> Outcome:
    """What a family does when it is asked for something, and the product's words where it is refused."""
    try:
        return CELLS[column](one), ""
    except ConfigError as refusal:
        return "no", " ".join(str(refusal).split())


@functools.cache
def read_page() -> dict[tuple[str, str], Outcome]:
    """The cells of the table as it stands."""
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index(_BEGIN) : text.index(_END)]
    notes = dict(re.findall(r"^\[\^(\w+)\]: (.*)$", table, flags=re.MULTILINE))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    columns, rows = lines[0][1:], lines[2:]
    cells = {}
    for name, *outcomes in rows:
        for column, outcome in zip(columns, outcomes, strict=True):
            word, _, note = outcome.partition("[^")
            cells[name, column] = (word, notes[note.rstrip("]")] if note else "")
    return cells


def write_page() -> None:
    """Try every cell, and put the table in the place of the one that stands there.

    What cannot be tried on this machine stays as it was.
    """
    before_now = read_page()
    notes: dict[str, str] = {}  # reason -> mark
    lines = ["| | " + " | ".join(CELLS) + " |", "|---|" + "---|" * len(CELLS)]
    for name in FAMILIES_SHOWN:
        cells = []
        for column in CELLS:
            absent = name in ORIGINALS and ORIGINALS[name].missing is not None
            word, reason = before_now[name, column] if absent else try_cell(subject(name), column)
            mark = f"[^{notes.setdefault(reason, str(len(notes) + 1))}]" if reason else ""
            cells.append(word + mark)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"[^{mark}]: {reason}" for reason, mark in notes.items())]
    text = PAGE.read_text(encoding="utf-8")
    before, after = text[: text.index(_BEGIN) + len(_BEGIN)], text[text.index(_END) :]
    PAGE.write_text(before + "\n".join(lines) + "\n" + after, encoding="utf-8")


if __name__ == "__main__":
    write_page()
    sys.stdout.write(f"{PAGE} is written\n")
