"""The tables of docs/benchmarks/scale.md."""

from __future__ import annotations

from collections.abc import Sequence

from tests.bench.report import Report


def scale_table(report: Report, modes: Sequence[str]) -> list[str]:
    """Time and memory of plans, by mode."""
    lines = [
        "| mode | first plan | resume at 1% | at 50% | at 99% | next step | memory | state |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for mode in modes:
        names = ("first plan", "resume at 1%", "resume at 50%", "resume at 99%")
        cells = [f"{report.find(f'{mode}/{name}').value:.2f} s" for name in names]
        cells.append(f"{report.find(f'{mode}/next step').value * 1000:.0f} ms")
        cells.append(f"{report.find(f'{mode}/memory').value:.0f} MB")
        cells.append(f"{report.find(f'{mode}/state').value:.0f} B")
        lines.append(f"| {mode} | " + " | ".join(cells) + " |")
    return lines


def files_table(report: Report) -> list[str]:
    """The same from files, where that was measured."""
    measured = [figure for figure in report.figures if figure.name.endswith("/indexes read")]
    if not measured:
        return []
    lines = [
        "The same from files: 10^5 shards with a manifest, and real indexes for the shards of the step's window.",
        "",
        "| mode, position | first plan | of which opening the source | indexes read | memory |",
        "|---|---|---|---|---|",
    ]
    for figure in measured:
        where = figure.name.removesuffix("/indexes read")
        total, opening, memory = (
            report.find(f"{where}/{name}").value for name in ("first plan", "of which opening the source", "memory")
        )
        place = where.replace(" from files/", ", ")
        lines.append(f"| {place} | {total:.2f} s | {opening:.2f} s | {figure.value:.0f} | {memory:.0f} MB |")
    return [*lines, ""]


def batching_table(report: Report) -> list[str]:
    """Padding and balance, by mix, mode and ranks."""
    lines = [
        "| mix | mode | ranks | padding | tokens max/mean | row by row | patches max/mean | row by row |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for figure in [one for one in report.figures if one.name.endswith("/padding")]:
        where = figure.name.removesuffix("/padding")
        mix, mode, *ranks = where.split("/")
        names = [f"max over mean of {costs}{rows}" for costs in ("tokens", "patches") for rows in ("", ", row by row")]
        cells = [f"{figure.value:.1%}", *(f"{report.find(f'{where}/{name}').value:.3f}" for name in names)]
        lines.append(f"| {mix} | {mode} | {', '.join(ranks).replace(' ranks', '')} | " + " | ".join(cells) + " |")
    return lines
