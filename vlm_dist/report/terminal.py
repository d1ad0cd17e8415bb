"""A report in short, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm_dist.errors import printable
from vlm_dist.report.comparison import Row
from vlm_dist.report.curves import GIBIBYTE
from vlm_dist.report.happenings import Happening, clock_time
from vlm_dist.report.lines import Floats
from vlm_dist.report.report import Report, RunView

_BARS = "▁▂▃▄▅▆▇█"
_NUM_BARS = 60
_MAX_EVENTS = 12
_STYLES = {"good": "green", "warn": "yellow", "bad": "red"}

#: Column of the metrics, its name, and how a number is shown.
_CURVES = (
    ("loss", "loss", ".4f", 1.0),
    ("learning_rate", "learning rate", ".2e", 1.0),
    ("grad_norm", "gradient norm", ".3f", 1.0),
    ("tokens_per_second", "tokens/s", ",.0f", 1.0),
    ("mfu", "MFU", ".1%", 1.0),
    ("data_wait_share", "data wait", ".1%", 1.0),
    ("padding_share", "padding", ".1%", 1.0),
    ("host_memory_bytes", "host memory, GiB", ".2f", 1 / GIBIBYTE),
    ("device_memory_bytes", "device memory, GiB", ".2f", 1 / GIBIBYTE),
)


def print_report(report: Report, console: Console | None = None) -> None:
    """Print final figures, small curves and the last events."""
    console = console or Console(highlight=False)
    for view in report.views:
        _print_run(view, console)
    if len(report.views) > 1:
        _print_rows("figures", report.figures, report, console)
        if report.differing:
            _print_rows("what differs", report.differing, report, console)
    else:
        wanted = ("time in steps", "samples seen", "tokens seen", "held-out loss, last", "best checkpoint",
                  "skipped samples", "non-finite steps", "starts")  # fmt: skip
        for row in report.figures:
            if row.name in wanted:
                console.print(_line(row.name, row.cells[0]))


def sparkline(values: Floats, width: int = _NUM_BARS) -> str:
    """A curve in one line of characters: means of equal stretches; a blank where nothing is known.

    Args:
        values: [N]; NaN is a gap.
        width: characters, fewer where there are fewer values.
    """
    if not np.isfinite(values).any():
        return ""
    means = [
        float(np.nanmean(part)) if np.isfinite(part).any() else np.nan
        for part in np.array_split(values, min(width, len(values)))
    ]
    low, high = np.nanmin(means), np.nanmax(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if np.isnan(one) else _BARS[round((one - low) * scale)] for one in means)


def _print_run(view: RunView, console: Console) -> None:
    run, state = view.record, view.state
    head = Text(_safe(run.name), "bold")
    head.append(f"  {state.word}", _STYLES[state.level])
    if state.detail:
        head.append(f"  {_safe(state.detail)}", "dim")
    console.print(head)
    if state.error:
        console.print(Text(_safe(state.error), "red"))
    for remark in run.remarks:
        console.print(Text(_safe(remark), "yellow"))
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for _ in range(4):
        table.add_column(no_wrap=True)
    for name, label, form, scale in _CURVES:
        values = run.train[name] * scale
        known = values[np.isfinite(values)]
        if len(known):
            first, last = format(known[0], form), format(known[-1], form)
            width = min(max(console.width - 46, 12), _NUM_BARS)
            table.add_row(Text(label, "dim"), sparkline(values, width), first if len(known) > 1 else "", f"→ {last}")
    if table.row_count:
        console.print(table)
    shown = [one for one in view.happenings if one.kind != "skipped"]
    if len(shown) > _MAX_EVENTS:
        console.print(Text(f"… {len(shown) - _MAX_EVENTS} earlier events", "dim"))
    for one in shown[-_MAX_EVENTS:]:
        console.print(_event(one), no_wrap=True, overflow="ellipsis")


def _event(one: Happening) -> Text:
    text = Text(f"{clock_time(one.time)}  step {one.step:>6,}  ", "dim")
    text.append(_safe(one.what), _STYLES.get(one.level, ""))
    text.append(f"  {_safe(one.detail)}", "dim")
    return text


def _print_rows(title: str, rows: Sequence[Row], report: Report, console: Console) -> None:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for view in report.views:
        table.add_column(_safe(view.record.name), justify="right")
    for row in rows:
        cells = [Text(_safe(cell), "green" if number in row.best else "") for number, cell in enumerate(row.cells)]
        table.add_row(Text(_safe(row.name), "dim"), *cells)
    console.print(table)


def _line(name: str, value: str) -> Text:
    text = Text(f"{name}: ", "dim")
    text.append(_safe(value), "default")
    return text


def _safe(text: str) -> str:
    """Text from files without what would steer a terminal."""
    return printable("".join(letter if letter.isprintable() else " " for letter in text))
