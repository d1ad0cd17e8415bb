"""Final figures of runs side by side, and what differs in their configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_dist.report.curves import GIBIBYTE
from vlm_dist.report.evaluations import held_out_loss, losses_by_source
from vlm_dist.report.points import Clock
from vlm_dist.report.run_files import RunRecord
from vlm_dist.report.state import ago, num_steps, state_of, steps_done

#: Differs between any two runs, and says nothing of them.
_PLACES = ("train.output_dir", "train.run_name", "train.resume")


@dataclass(frozen=True)
class Row:
    """One line of a table: a name, and a cell per run.

    Attributes:
        name: of the figure.
        cells: as text; `-` where there is none.
        best: which cells are the best ones; empty where none is better.
    """

    name: str
    cells: tuple[str, ...]
    best: frozenset[int] = frozenset()


def final_figures(runs: Sequence[RunRecord]) -> list[Row]:
    """The figures of each run as far as it is; those that no run has are left out."""
    clocks = [Clock(run.train) for run in runs]

    def text(name: str, cell: Callable[[int, RunRecord], str]) -> Row:
        return Row(name, tuple(cell(number, run) for number, run in enumerate(runs)))

    def number(
        name: str,
        value: Callable[[RunRecord], float | None],
        form: str,
        better: Callable[[Sequence[float]], float] | None = None,
    ) -> Row:
        values = [value(run) for run in runs]
        cells = tuple("-" if one is None else format(one, form) for one in values)
        known = [one for one in values if one is not None]
        top = format(better(known), form) if better is not None and len(known) > 1 else None
        best = frozenset(i for i, cell in enumerate(cells) if cell == top)
        return Row(name, cells, best if len(best) < len(known) else frozenset())

    sources = dict.fromkeys(source for run in runs for record in run.evals for source in losses_by_source(record))
    rows = [
        text("state", lambda _, run: state_of(run).word),
        text("steps", lambda _, run: describe_steps(run)),
        text("time in steps", lambda i, run: ago(clocks[i].hours[-1] * 3600) if len(run.train) else "-"),
        text("samples seen", lambda i, run: f"{clocks[i].samples[-1]:,.0f}" if len(run.train) else "-"),
        text("tokens seen", lambda i, run: f"{clocks[i].tokens[-1]:,.0f}" if len(run.train) else "-"),
        number("loss, last line", lambda run: run.train.last("loss"), ".4f", min),
        number("loss, last tenth", last_tenth, ".4f", min),
        number("held-out loss, last", last_eval_loss, ".4f", min),
        number("held-out loss, best", best_eval_loss, ".4f", min),
        *(
            number(f"held-out loss of {source}, last", lambda run, s=source: _last_of(run, s), ".4f", min)  # type: ignore[misc]
            for source in (sources if len(sources) > 1 else ())
        ),
        text("best checkpoint", lambda _, run: describe_best(run)),
        number("tokens/s", lambda run: run.train.mean("tokens_per_second"), ",.0f", max),
        number("samples/s", lambda run: run.train.mean("samples_per_second"), ",.2f", max),
        number("seconds per step", lambda run: run.train.mean("step_seconds"), ".3f"),
        number("MFU", lambda run: run.train.mean("mfu"), ".1%", max),
        number("data wait", lambda run: run.train.mean("data_wait_share"), ".1%"),
        number("padding", lambda run: run.train.mean("padding_share"), ".1%"),
        number("host memory, GiB", lambda run: _scaled(run.train.best("host_memory_bytes", True)), ".2f"),
        number("device memory, GiB", lambda run: _scaled(run.train.best("device_memory_bytes", True)), ".2f"),
        text("skipped samples", lambda _, run: f"{np.nansum(run.train['num_skipped']):,.0f}"),
        text("non-finite steps", lambda _, run: f"{np.nansum(run.train['num_nonfinite_steps']):,.0f}"),
        text("starts", lambda _, run: str(max(1, sum(event["event"] == "started" for event in run.events)))),
        text("steps done again", lambda _, run: f"{np.nansum(run.superseded.window_steps):,.0f}"),
    ]  # fmt: skip
    return [row for row in rows if any(cell != "-" for cell in row.cells)]


def describe_steps(run: RunRecord) -> str:
    """Steps that are done, of all."""
    done, total = steps_done(run), num_steps(run)
    return f"{done:,}" + (f" of {total:,} ({done / total:.0%})" if total else "")


def describe_best(run: RunRecord) -> str:
    """Value, metric and place of the best checkpoint."""
    if run.best is None:
        return "-"
    there = "" if run.best["step"] in run.checkpoints else ", no longer there"
    return f"{float(run.best['value']):.4f} ({run.best['metric']}) at step {run.best['step']}{there}"


def last_tenth(run: RunRecord) -> float | None:
    """Mean loss of the last tenth of the lines."""
    losses = run.train["loss"]
    tail = losses[-max(1, len(losses) // 10) :]
    return float(np.nanmean(tail)) if np.isfinite(tail).any() else None


def last_eval_loss(run: RunRecord) -> float | None:
    """Of the last evaluation that has one."""
    return next((one for record in reversed(run.evals) if (one := _loss_of(record)) is not None), None)


def best_eval_loss(run: RunRecord) -> float | None:
    """The smallest of all evaluations."""
    return min((one for record in run.evals if (one := _loss_of(record)) is not None), default=None)


def _loss_of(record: Mapping[str, Any]) -> float | None:
    value = held_out_loss(record)
    return None if np.isnan(value) else value


def _last_of(run: RunRecord, source: str) -> float | None:
    for record in reversed(run.evals):
        value = losses_by_source(record).get(source, float("nan"))
        if not np.isnan(value):
            return value
    return None


def _scaled(num_bytes: float | None) -> float | None:
    return None if num_bytes is None else num_bytes / GIBIBYTE


def differing_settings(configs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """What differs between resolved configurations: key, and its value in each."""
    flat = [flattened(config) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    return [
        Row(key, tuple(_shown(one, key) for one in flat))
        for key in keys
        if key not in _PLACES and len({_shown(one, key) for one in flat}) > 1
    ]


def flattened(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists of mappings as one, with dotted keys: `data.train[0].path`."""
    if isinstance(values, Mapping) and values:
        inner = ((f"{prefix}.{key}" if prefix else str(key), value) for key, value in values.items())
    elif isinstance(values, list) and any(isinstance(one, Mapping) for one in values):
        inner = ((f"{prefix}[{number}]", value) for number, value in enumerate(values))
    else:
        return {prefix: values} if prefix else {}
    return {key: value for name, child in inner for key, value in flattened(child, name).items()}


def _shown(flat: Mapping[str, Any], key: str) -> str:
    if key not in flat:
        return "-"
    value = flat[key]
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 300 else f"{text[:299]}…"
