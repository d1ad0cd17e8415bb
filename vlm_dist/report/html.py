"""A report as a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_dist.observability.page import Page, data_uri
from vlm_dist.report.comparison import describe_best, describe_steps
from vlm_dist.report.environment import describe_life
from vlm_dist.report.figures import axes_of, chart_figure, color_of, timeline
from vlm_dist.report.happenings import Happening, clock_time, size
from vlm_dist.report.pictures import Shots, Wanted
from vlm_dist.report.points import AXES, SMOOTHINGS, Axis, Clock
from vlm_dist.report.report import Report, RunView
from vlm_dist.report.state import ago, began_at

#: Rows of a table of events; the first and the last ones are shown.
MAX_EVENTS = 200


@dataclass(frozen=True)
class EventTable:
    """Events of a run, with a gap in the middle where there are too many."""

    first: Sequence[Happening]
    num_left_out: int
    last: Sequence[Happening]


def write_page(report: Report, path: Path, axis: Axis = "step") -> None:
    """Write the page.

    Args:
        report: what is shown.
        path: of the file.
        axis: of the curves when it opens.
    """
    make_page(report).write(path, **page_values(report, axis))


def make_page(report: Report) -> Page:
    """The shell, and what stands in its head."""
    several = len(report.views) > 1
    nav = [("runs", "Runs" if several else "Run"), ("curves", "Curves"), ("events", "Events")]
    nav += [("checkpoints", "Checkpoints")] if any(view.checkpoints for view in report.views) else []
    nav += [("skipped", "Skipped samples")] if any(view.skipped.samples for view in report.views) else []
    nav += [("answers", "Answers")] if any(view.answers for view in report.views) else []
    nav += [("configuration", "Configuration"), ("environment", "Environment")]
    names = ", ".join(view.record.name for view in report.views)
    return Page(
        "Training report",
        names if several else str(report.views[0].record.path),
        templates=Path(__file__).parent,
        template="report.html.jinja",
        facts=_facts(report),
        nav=nav,
        script="report.js",
        filters={
            "clock": clock_time,
            "size": size,
            "duration": lambda seconds: "-" if seconds is None else ago(seconds),
            "color": color_of,
            "uri": lambda jpeg: data_uri(jpeg, "image/jpeg"),
            "figure": lambda value: "-" if value is None else f"{value:.3g}",
        },
    )


def page_values(report: Report, axis: Axis) -> dict[str, Any]:
    """What the template is filled with."""
    records = report.records
    axes = axes_of(records)
    return {
        "report": report,
        "intros": [intro(view) for view in report.views],
        "several": len(records) > 1,
        "axis": axis,
        "axes": AXES,
        "smoothings": [length for length in SMOOTHINGS if _is_smoothed(report, length)],
        "figures": [(chart, chart_figure(chart, records, axis, axes)) for chart in report.charts],
        "timeline": timeline([view.happenings for view in report.views], records, axis, axes),
        "timeline_rows": len({one.kind for view in report.views for one in view.happenings}),
        "events": [event_table(view.happenings) for view in report.views],
        "shots": lambda number, purpose, one: report.shots.get(
            Wanted(number, purpose, one.source, one.shard, one.key), Shots()
        ),
        "lives": [
            [describe_life(life, number) for number, life in enumerate(view.record.lives, 1)][::-1]
            for view in report.views
        ],
    }


def _facts(report: Report) -> list[tuple[str, str]]:
    if len(report.views) > 1:
        words = [view.state.word for view in report.views]
        counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
        return [("runs", str(len(words))), ("state", counts)]
    view = report.views[0]
    run = view.record
    facts = [("state", view.state.word), ("steps", describe_steps(run))]
    if len(run.train):
        clock = Clock(run.train)
        facts.append(("time in steps", ago(float(clock.hours[-1]) * 3600)))
        facts.append(("samples", short(float(clock.samples[-1]))))
        facts.append(("tokens", short(float(clock.tokens[-1]))))
        loss = run.train.last("loss")
        facts += [("loss", f"{loss:.4f}")] if loss is not None else []
    if run.best is not None:
        facts.append((f"best {run.best['metric']}", f"{float(run.best['value']):.4f}"))
    return facts


def intro(view: RunView) -> list[tuple[str, str]]:
    """What is known of a run besides its figures: names and values."""
    run = view.record
    rows = [("directory", str(run.path.resolve()))]
    began = began_at(run)
    if began is not None:
        rows.append(("began", f"{clock_time(began)} UTC"))
    if run.last_sign:
        rows.append(("last written", f"{clock_time(run.last_sign)} UTC"))
    if run.best is not None:
        here = run.checkpoints.get(run.best["step"])
        rows.append(("best checkpoint", f"{describe_best(run)}: {here.path}" if here else describe_best(run)))
    elif run.checkpoints:
        rows.append(("newest checkpoint", str(run.checkpoints[max(run.checkpoints)].path)))
    if run.has_adapter:
        rows.append(("final adapter", str(run.path / "adapter")))
    if run.config.get("model_id"):
        rows.append(("model", str(run.config["model_id"])))
    return rows


def event_table(happenings: Sequence[Happening]) -> EventTable:
    """The events of a table: skipped samples have a section of their own."""
    shown = [one for one in happenings if one.kind != "skipped"]
    if len(shown) <= MAX_EVENTS:
        return EventTable(shown, 0, [])
    half = MAX_EVENTS // 2
    return EventTable(shown[:half], len(shown) - 2 * half, shown[-half:])


def short(number: float) -> str:
    """A count for people: 950, 12,345, 1.23 M, 4.5 G."""
    if number < 100_000:
        return f"{number:,.0f}"
    exponent = min(int(math.log10(number) // 3), 4)
    return f"{number / 1000**exponent:.3g} {' kMGT'[exponent]}"


def _is_smoothed(report: Report, length: int) -> bool:
    return any(length in curve.smooth for chart in report.charts for curve in chart.curves)
