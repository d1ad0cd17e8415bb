"""Figures of an evaluation as a table of text."""

from __future__ import annotations

from collections.abc import Mapping


def format_figures(figures: Mapping[str, float]) -> str:
    """A row for each source, a column for each figure.

    Args:
        figures: by `<source>/<figure>`.
    """
    rows = list(dict.fromkeys(name.rpartition("/")[0] for name in figures))
    columns = list(dict.fromkeys(name.rpartition("/")[2] for name in figures))
    cells = [["", *columns]]
    cells += [[row, *(_text(figures.get(f"{row}/{column}")) for column in columns)] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in cells
    )


def _text(value: float | None) -> str:
    if value is None or value != value:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}"
