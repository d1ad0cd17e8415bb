"""Charts as plotly figures; what the page's script needs to change axis and smoothing travels in `meta`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_dist.observability.page import chart_text
from vlm_dist.observability.page.palette import BAD, GOOD, MUTED, SERIES, WARN
from vlm_dist.report.curves import Chart
from vlm_dist.report.happenings import KINDS, Happening
from vlm_dist.report.lines import Floats
from vlm_dist.report.points import AXES, Axis, Clock, Curve, Points
from vlm_dist.report.run_files import RunRecord

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SYMBOLS = {"start": "triangle-right", "end": "square", "checkpoint": "diamond", "evaluation": "circle",
            "non-finite": "x", "skipped": "line-ns-open"}  # fmt: skip
_LEVELS = {"good": GOOD, "warn": WARN, "bad": BAD}
_DIGITS = 6
_PLAIN_NUMBERS = {"exponentformat": "none", "separatethousands": True}


@dataclass(frozen=True)
class Axes:
    """The horizontal axes.

    Attributes:
        titles: by name.
        ends: by name, in the unit of the title.
        per_hour: units of time in an hour.
    """

    titles: dict[Axis, str]
    ends: dict[Axis, float]
    per_hour: float

    def scale(self, axis: Axis) -> float:
        """By what positions are multiplied."""
        return self.per_hour if axis == "time" else 1


def color_of(run: int) -> str:
    """The colour of a run, in all charts."""
    return SERIES[run % len(SERIES)]


def chart_figure(chart: Chart, runs: Sequence[RunRecord], axis: Axis, axes: Axes) -> Figure:
    """Draw a chart; with several runs, colours tell these, and dashes what is within them.

    Args:
        chart: what is drawn.
        runs: for their names.
        axis: at first.
        axes: of all charts.
    """
    import plotly.graph_objects as go

    names = list(dict.fromkeys(curve.name for curve in chart.curves if curve.kind != "faint"))
    figure = go.Figure()
    for curve in chart.curves:
        number = names.index(curve.name) if curve.kind != "faint" else 0
        alone = len(runs) == 1
        color = color_of(number if alone else curve.run)
        if curve.kind == "faint":
            color = MUTED if alone else color
        label = curve.name if alone else runs[curve.run].name
        if not alone and (len(names) > 1 or curve.kind == "faint"):
            label = f"{label}: {curve.name}"
        figure.add_trace(_trace(curve, chart_text(label), color, axis, axes, dash=0 if alone else number))
    if len(runs) > 1 and len(names) > 1:  # the page says which colour is which run: here is left what dashes are
        figure.update_traces(showlegend=False)
        for number, name in enumerate(names):
            line = {"color": MUTED, "width": 1.6, "dash": _DASHES[number % len(_DASHES)]}
            figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", name=chart_text(name), line=line))
    top = _top(chart.curves)
    figure.update_layout(
        xaxis={"title": {"text": axes.titles[axis]}, "range": [0, axes.ends[axis]]},
        yaxis={
            "title": {"text": chart.unit},
            **({"exponentformat": "e"} if chart.key in ("lr", "tflops") else _PLAIN_NUMBERS),
            **({"rangemode": "tozero"} if chart.is_from_zero else {}),
            **({"range": [0, top]} if chart.is_share else {}),
            **({"tickformat": ".0%"} if chart.key == "share" else {}),
        },
        showlegend=len(names) > 1 or (len(runs) == 1 and len(figure.data) > 1),
        hovermode="x unified" if len(figure.data) < 9 else "closest",
        uirevision=chart.key,
        meta={
            "key": chart.key,
            "canBeLog": chart.can_be_log,
            "usual": _usual(chart),
            "axes": axes.titles,
            "ends": axes.ends,
        },
    )
    return figure


def _trace(curve: Curve, label: str, color: str, axis: Axis, axes: Axes, dash: int) -> Any:
    import plotly.graph_objects as go

    few = curve.kind == "dots" or np.isfinite(curve.points.y).sum() < 40
    alone = isolated(curve.points.y)
    mode = "lines+markers" if few or any(alone) else "lines"
    sizes: Any = (7 if curve.kind == "dots" else 4) if few else [4 if one else 0 for one in alone]
    style: dict[str, Any] = {"color": color, "width": 1.6}
    if curve.kind == "dots":
        style["width"] = 1
    if curve.kind == "faint":
        mode, style = "lines", {"color": color, "width": 1.2, "dash": "dot"}
    elif dash:
        style["dash"] = _DASHES[dash % len(_DASHES)]
    points = _plain(curve.points, axes)
    return go.Scatter(
        x=points[axis],
        y=points["y"],
        name=label,
        mode=mode,
        line=style,
        marker={"color": color, "size": sizes, "opacity": 1, "line": {"width": 0}},
        opacity=0.7 if curve.kind == "faint" else 1,
        connectgaps=curve.kind == "dots",  # nothing is to be expected between two evaluations
        meta={
            "run": curve.run,
            "raw": points,
            "smooth": {str(length): _plain(one, axes) for length, one in curve.smooth.items()},
        },
    )


def timeline(happenings: Sequence[Sequence[Happening]], runs: Sequence[RunRecord], axis: Axis, axes: Axes) -> Figure:
    """Events on the axis of the curves, a row per kind."""
    import plotly.graph_objects as go

    figure = go.Figure()
    alone = len(runs) == 1
    kinds = [kind for kind in KINDS if any(one.kind == kind for all_ in happenings for one in all_)]
    for number, (run, all_) in enumerate(zip(runs, happenings, strict=True)):
        clock = Clock(run.train)
        for kind in kinds:
            chosen = _spread([one for one in all_ if one.kind == kind])
            if not chosen:
                continue
            places = clock.at([one.step for one in chosen])
            raw: dict[str, Any] = {name: _rounded(values * axes.scale(name)) for name, values in places.items()}
            colors = [_LEVELS.get(one.level, SERIES[0]) if alone else color_of(number) for one in chosen]
            words = [f"step {one.step}: {one.what}" + (f"<br>{_wrapped(one.detail)}" if one.detail else "") for one in
                     (_escaped(one) for one in chosen)]  # fmt: skip
            row = kind if alone else f"{kind} "
            figure.add_trace(
                go.Scatter(
                    x=raw[axis],
                    y=[row] * len(chosen),
                    mode="markers",
                    text=words,
                    hoverinfo="text",
                    name=chart_text(run.name),
                    showlegend=False,
                    marker={
                        "color": colors,
                        "symbol": _SYMBOLS[kind],
                        "size": 11,
                        "line": {"width": 2 if kind == "skipped" else 0, "color": colors},
                    },
                    meta={"run": number, "raw": raw | {"y": [row] * len(chosen)}, "smooth": {}},
                )
            )
    figure.update_layout(
        xaxis={"title": {"text": axes.titles[axis]}, "range": [-0.02 * axes.ends[axis], axes.ends[axis]]},
        yaxis={"categoryorder": "array", "categoryarray": [k if alone else f"{k} " for k in reversed(kinds)]},
        hovermode="closest",
        meta={"key": "timeline", "canBeLog": False, "axes": axes.titles, "ends": axes.ends},
        uirevision="timeline",
    )
    return figure


def _spread(found: list[Happening], most: int = 400) -> list[Happening]:
    """At most so many, evenly chosen; bad ones always."""
    if len(found) <= most:
        return found
    every = -(-len(found) // most)
    return [one for number, one in enumerate(found) if number % every == 0 or one.level == "bad"][: 2 * most]


def _escaped(one: Happening) -> Happening:
    detail = one.detail if len(one.detail) <= 300 else f"{one.detail[:299]}…"
    return Happening(one.kind, one.step, chart_text(one.what), chart_text(detail), one.time, one.level)


def _wrapped(text: str, width: int = 70) -> str:
    lines, line = [], ""
    for word in text.split(" "):
        if line and len(line) + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return "<br>".join([*lines, line])


def _plain(points: Points, axes: Axes) -> dict[str, list[float | int | None]]:
    plain: dict[str, list[float | int | None]] = {"y": _rounded(points.y)}
    for name, values in points.x.items():
        plain[name] = _rounded(values * axes.scale(name))
    return plain


def _rounded(values: Floats) -> list[float | int | None]:
    """Numbers in few digits, since they are most of the page; None for gaps."""
    plain: list[float | int | None] = []
    for value in values.tolist():
        if value != value:
            plain.append(None)
        elif value == int(value) and abs(value) < 2**53:
            plain.append(int(value))
        else:
            plain.append(float(f"{value:.{_DIGITS}g}"))
    return plain


def _top(curves: Sequence[Curve]) -> float:
    """Upper end of an axis of shares: not so near that nothing looks like much."""
    highest = max((float(np.nanmax(c.points.y)) for c in curves if np.isfinite(c.points.y).any()), default=0.0)
    return highest * 1.08 if highest > 0 else 1.0


def _usual(chart: Chart) -> list[float] | None:
    """Where all but the outliers lie, with a margin; None where there are too few values to tell."""
    values = np.concatenate([curve.points.y for curve in chart.curves])
    values = values[np.isfinite(values)]
    if len(values) < 50:
        return None
    low, high = np.percentile(values, [0.5, 99]).tolist()
    margin = 0.06 * (high - low)
    bottom = 0.0 if chart.is_from_zero or chart.is_share else low - margin
    return [bottom, high + margin] if margin > 0 else None


def isolated(values: Floats) -> list[bool]:
    """Which values have a gap on both sides, so that no line leads to them, [N]."""
    known = np.isfinite(np.concatenate([[np.nan], values, [np.nan]]))
    alone: list[bool] = (known[1:-1] & ~known[:-2] & ~known[2:]).tolist()
    return alone


def axes_of(runs: Sequence[RunRecord]) -> Axes:
    """The axes of all charts: long enough for the longest run, with a fitting unit of time."""
    ends: dict[Axis, float] = {}
    for axis in AXES:
        last = [Clock(run.train).at(run.train.step[-1:])[axis] for run in runs if len(run.train)]
        last += [np.asarray([float(record["step"])]) for run in runs for record in run.evals if axis == "step"]
        ends[axis] = max((float(one[-1]) for one in last), default=1.0) * 1.015 or 1.0
    hours = ends["time"]
    unit, per_hour = ("hours", 1) if hours > 1.5 else ("minutes", 60) if hours > 0.04 else ("seconds", 3600)
    return Axes({**AXES, "time": f"{unit} of training (steps alone)"}, {**ends, "time": hours * per_hour}, per_hour)
