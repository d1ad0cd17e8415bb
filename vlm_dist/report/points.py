"""Points of curves: placed on each axis, thinned so that a page stays small, with gaps where nothing is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlm_dist.report.lines import Floats, Lines

Axis = Literal["step", "time", "tokens"]

#: What the time axis of curves may be: name -> title.
AXES: dict[Axis, str] = {
    "step": "step",
    "time": "hours of training",
    "tokens": "tokens seen (millions)",
}
#: Lines over which curves are smoothed, where they have as many.
SMOOTHINGS = (5, 25, 100)
#: Points of a curve of one run; several runs share them.
MAX_POINTS = 2400
MIN_POINTS = 300


@dataclass
class Points:
    """Points to draw: the same on each axis, [N]; NaN in `y` is a gap."""

    x: dict[Axis, Floats]
    y: Floats


@dataclass
class Curve:
    """One line of a chart.

    Attributes:
        run: which run it is of.
        name: what it is, within its run.
        points: as they are, thinned.
        smooth: means over so many lines -> points.
        kind: `line`; `dots` where there are few points far from each other; `faint` for what does not count.
    """

    run: int
    name: str
    points: Points
    smooth: dict[int, Points] = field(default_factory=dict)
    kind: Literal["line", "dots", "faint"] = "line"


class Clock:
    """Where on each axis a step lies.

    Args:
        lines: of the run.
    """

    def __init__(self, lines: Lines) -> None:
        seconds = lines.window_seconds
        self._steps = lines.step
        self.hours: Floats = np.cumsum(seconds) / 3600
        self.tokens: Floats = np.cumsum(np.nan_to_num(lines["tokens_per_second"]) * seconds)
        self.samples: Floats = np.cumsum(np.nan_to_num(lines["samples_per_second"]) * seconds)

    def at(self, steps: NDArray[np.int64] | Sequence[int]) -> dict[Axis, Floats]:
        """Positions of steps, [N] each: those of the last line that is not later."""
        steps = np.asarray(steps, dtype=np.int64)
        rows = np.searchsorted(self._steps, steps, side="right") - 1
        return {
            "step": steps.astype(float),
            "time": np.where(rows >= 0, np.take(np.append(self.hours, 0.0), rows), 0.0),
            "tokens": np.where(rows >= 0, np.take(np.append(self.tokens, 0.0), rows), 0.0) / 1e6,
        }


def train_curve(
    run: int, lines: Lines, clock: Clock, column: str, name: str, most: int, scale: float = 1.0, smooth: bool = False
) -> Curve:
    """A column of a run's lines as a curve.

    Args:
        run: number of the run.
        lines: of it.
        clock: of it.
        column: which one.
        name: of the curve.
        most: points.
        scale: by which numbers are multiplied.
        smooth: whether its means are wanted, too.
    """
    steps, rows = with_gaps(lines)
    values = np.append(lines[column] * scale, np.nan)[rows]
    x = clock.at(steps)
    curve = Curve(run, name, _chosen(x, values, thinned(values, most)))
    if smooth:
        for length in SMOOTHINGS:
            if length * 2 <= len(lines):
                mean = running_mean(values, length)
                curve.smooth[length] = _chosen(x, mean, thinned(mean, max(most // 4, MIN_POINTS)))
    return curve


def superseded_points(lines: Lines, clock: Clock, most: int) -> Points:
    """Lines that do not count: each attempt a piece of its own."""
    cut = np.flatnonzero(np.diff(lines.step) <= 0) + 1
    rows = np.insert(np.arange(len(lines)), cut, -1)
    values = np.append(lines["loss"], np.nan)[rows]
    x = clock.at(np.append(lines.step, 0)[np.where(rows < 0, 0, rows)])
    return _chosen(x, values, thinned(values, most))


def with_gaps(lines: Lines) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Steps and rows [N] of the lines, and row -1 where lines are missing in between."""
    first = lines.step - lines.window_steps.astype(np.int64)
    missing = np.flatnonzero(first[1:] > lines.step[:-1]) + 1
    rows = np.insert(np.arange(len(lines)), missing, -1)
    steps = np.insert(lines.step, missing, lines.step[missing - 1]) if len(missing) else lines.step
    return steps, rows


def thinned(values: Floats, most: int) -> NDArray[np.int64]:
    """Which points are drawn, at most about so many: of every stretch the smallest, the greatest and any gap.

    Args:
        values: [N]; NaN is a gap.
        most: points.

    Returns:
        Ascending positions; all where there are few.
    """
    count = len(values)
    if count <= most:
        return np.arange(count)
    kept = {0, count - 1}
    edges = np.linspace(0, count, max(most // 3, 1) + 1).astype(int)
    for first, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        stretch = values[first:end]
        gaps = np.isnan(stretch)
        if gaps.any():
            kept.add(first + int(gaps.argmax()))
        if not gaps.all():
            kept |= {first + int(np.nanargmin(stretch)), first + int(np.nanargmax(stretch))}
    return np.asarray(sorted(kept), dtype=np.int64)


def running_mean(values: Floats, length: int) -> Floats:
    """The mean of each value and its neighbours, [N]; what is not known is left out, and a gap stays one."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    positions = np.arange(len(values))
    first = np.maximum(positions - length // 2, 0)
    end = np.minimum(positions + (length - length // 2), len(values))
    total, number = sums[end] - sums[first], counts[end] - counts[first]
    return np.where(known, total / np.maximum(number, 1), np.nan)


def _chosen(x: Mapping[Axis, Floats], y: Floats, rows: NDArray[np.int64]) -> Points:
    return Points({axis: values[rows] for axis, values in x.items()}, y[rows])
