"""The charts of runs: which there are, and the curves in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_dist.report.evaluations import figures_by_source, held_out_loss, losses_by_source
from vlm_dist.report.points import MAX_POINTS, MIN_POINTS, Clock, Curve, Points, superseded_points, train_curve
from vlm_dist.report.run_files import RunRecord

GIBIBYTE = 2**30


@dataclass
class Chart:
    """Curves that belong together.

    Attributes:
        key: names it.
        title: of it.
        unit: of the vertical axis.
        curves: of all runs.
        explanation: what it shows, in one sentence.
        is_share: it is drawn from 0 to at least so much, in percent.
        can_be_log: a logarithmic axis helps to read it.
        is_main: it is drawn large.
        is_from_zero: its axis begins at 0.
    """

    key: str
    title: str
    unit: str
    curves: list[Curve]
    explanation: str = ""
    is_share: bool = False
    can_be_log: bool = False
    is_main: bool = False
    is_from_zero: bool = False


def make_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """All charts that have something to show."""
    most = max(MAX_POINTS // len(runs), MIN_POINTS)
    clocks = [Clock(run.train) for run in runs]

    def of(names: str | Sequence[str], label: str = "", scale: float = 1.0, smooth: bool = False) -> list[Curve]:
        names = [names] if isinstance(names, str) else names
        return [
            train_curve(number, run.train, clocks[number], name, label or name, most, scale, smooth)
            for number, run in enumerate(runs)
            for name in names
            if run.train.has(name)
        ]

    def each(suffix: str, smooth: bool = False) -> list[Curve]:
        found = []
        for number, run in enumerate(runs):
            for name in run.train.names:
                source = name.removesuffix(suffix)
                if source != name and run.train.has(name):
                    found.append(train_curve(number, run.train, clocks[number], name, source, most, 1.0, smooth))
        return found

    def by_prefix(prefix: str) -> list[Curve]:
        return [
            train_curve(number, run.train, clocks[number], name, name.removeprefix(prefix), most)
            for number, run in enumerate(runs)
            for name in run.train.names
            if name.startswith(prefix) and run.train.has(name)
        ]

    def evaluated(choose: Callable[[Mapping[str, Any]], dict[str, float]]) -> list[Curve]:
        found = []
        for number, run in enumerate(runs):
            figures = [(record["step"], choose(record)) for record in run.evals]
            for name in dict.fromkeys(name for _, one in figures for name in one):
                steps = [step for step, _ in figures]
                values = np.asarray([one.get(name, np.nan) for _, one in figures])
                found.append(Curve(number, name, Points(clocks[number].at(steps), values), kind="dots"))
        return found

    faint = [
        Curve(n, "superseded", superseded_points(run.superseded, clocks[n], most), kind="faint")
        for n, run in enumerate(runs)
        if run.superseded.has("loss")
    ]
    memory = [
        *of("host_memory_bytes", "host", 1 / GIBIBYTE),
        *of("device_memory_bytes", "device, tensors", 1 / GIBIBYTE),
        *of("device_reserved_bytes", "device, reserved", 1 / GIBIBYTE),
    ]
    sources = each("/loss", smooth=True)
    utilisation = [*of("mfu", "MFU", 100, smooth=True), *of("hfu", "HFU", 100, smooth=True)]
    charts = [
        Chart(
            "loss",
            "Loss",
            "nats per target token",
            [*of("loss", "train", smooth=True), *evaluated(lambda record: {"eval": held_out_loss(record)}), *faint],
            "Dots: held-out data." + (" Dotted: steps that were done again." if faint else ""),
            can_be_log=True,
            is_main=True,
        ),
        Chart("source-loss", "Loss by source, training", "nats per target token", sources, can_be_log=True),
        Chart(
            "eval-loss",
            "Loss by source, held out",
            "nats per target token",
            evaluated(losses_by_source),
            can_be_log=True,
        ),
        *(
            Chart(f"eval-{name}", f"{_title(name)}, held out", "", curves, is_share=_is_share(curves))
            for name, curves in _other_figures(runs, evaluated).items()
        ),
        Chart("lr", "Learning rate", "", by_prefix("learning_rate/") or of("learning_rate"), can_be_log=True),
        Chart(
            "grad", "Gradient norm", "before clipping", of("grad_norm", "gradient norm", smooth=True), can_be_log=True
        ),
        Chart(
            "tokens",
            "Tokens per second",
            "real tokens, all ranks",
            of("tokens_per_second", "tokens/s", smooth=True),
            is_from_zero=True,
        ),
        Chart(
            "samples",
            "Samples per second",
            "all ranks",
            of("samples_per_second", "samples/s", smooth=True),
            is_from_zero=True,
        ),
        Chart(
            "mfu",
            "Utilisation of the devices",
            "% of their peak",
            utilisation,
            "MFU: what the samples need. HFU: what is computed, with padding and recomputation.",
            is_from_zero=True,
        ),
        Chart(
            "tflops",
            "TFLOP/s per device",
            "",
            [] if utilisation else of("tflops_per_device", "needed"),
            is_from_zero=True,
        ),
        Chart(
            "step",
            "Seconds per step",
            "seconds",
            of("step_seconds", "seconds", smooth=True),
            can_be_log=True,
            is_from_zero=True,
        ),
        Chart(
            "wait", "Data wait", "% of the time", of("data_wait_share", "data wait", 100, smooth=True), is_share=True
        ),
        Chart(
            "padding",
            "Padding",
            "% of computed tokens",
            of("padding_share", "padding", 100, smooth=True),
            is_share=True,
        ),
        Chart("memory", "Memory", "GiB, the largest of the ranks", memory, is_from_zero=True),
        Chart("slowest", "Slowest rank", "times the median", of("slowest_rank_ratio", "slowest rank")),
        Chart("share", "Tokens by source", "share of real tokens", each("/token_share", smooth=True), is_share=True),
    ]
    return [chart for chart in charts if any(np.isfinite(curve.points.y).any() for curve in chart.curves)]


def _other_figures(
    runs: Sequence[RunRecord], evaluated: Callable[[Callable[[Mapping[str, Any]], dict[str, float]]], list[Curve]]
) -> dict[str, list[Curve]]:
    names = {name for run in runs for record in run.evals for name in figures_by_source(record)}
    wanted = sorted(name for name in names if name != "loss" and not name.startswith("num_"))
    return {name: evaluated(lambda record, n=name: figures_by_source(record).get(n, {})) for name in wanted}  # type: ignore[misc]


def _title(name: str) -> str:
    words = name.replace("_", " ")
    return words.upper() if len(name) <= 4 else words[:1].upper() + words[1:]


def _is_share(curves: Sequence[Curve]) -> bool:
    values = np.concatenate([curve.points.y for curve in curves])
    known = values[np.isfinite(values)]
    return bool(len(known)) and bool(known.min() >= 0)
