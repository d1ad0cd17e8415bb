"""The page docs/benchmarks/training.md."""

from __future__ import annotations

from collections.abc import Mapping

from tests.bench.report import Report
from tests.bench.training.figures import TITLES, Results, Resumptions
from tests.bench.training.job import Job
from tests.bench.training.runs import NUM_RANKS, WARM_STEPS
from tests.bench.training.samples import MANY, SCALE

_NAMES = {
    "mix": "Pictures and texts of many lengths",
    "equal": "Samples of equal length",
}


def page(found: Mapping[str, Results], resumed: Resumptions, report: Report, rounds: int) -> str:
    """The body of the page."""
    job = Job("", "", "", "", "", 0)
    lines = [
        f"{NUM_RANKS} processes on a CPU, one thread each, float32, ZeRO-{job.zero}: {job.per_device} samples per",
        f"process and step; LoRA of rank {job.rank} on the language model of a small Qwen2-VL whose head has the share",
        "of the work that it has in Qwen2-VL-2B, frozen tower, gradient checkpointing on, loss on the answers alone.",
        "Samples are crops of real photographs, questions and answers, with the lengths of `tests/bench/lengths.py`",
        f"divided by {SCALE}. Every trainer runs in an environment of its own, as its documents have it (default), and",
        f"with what it offers for samples of many lengths. Runs take turns, {rounds} rounds; medians. Tokens are real",
        "ones, context and target, without padding, counted from what the model is given; the first",
        f"{WARM_STEPS} steps do not count, nor does the one behind a checkpoint. Stall: from the end of the step",
        "before a checkpoint until training may go on. *Our patch embedding* is offered by nobody: Trainer with the",
        "patch embedding as a matrix product, which on a CPU is a part of the difference.",
        "",
    ]
    for name, results in found.items():
        lines += [f"## {_NAMES[name]}", "", *_table(results), ""]
        lines += [f"* {TITLES[way[0]]}, {way[1]}: not measured: {reason}" for way, reason in results.reasons.items()]
        lines += [""] if results.reasons else []
    return "\n".join([*lines, *_resumed(resumed), *_aims(report)])


def _resumed(resumed: Resumptions) -> list[str]:
    lines = [
        f"## Resumed in the middle of {MANY:,} samples",
        "",
        "The rows of the mix again and again. A checkpoint of the first step is made to say that half of the epoch",
        "is done; what is measured is the run that goes on from it, once, to the end of its first step. What trainers",
        "keep of their data between runs is there. Trainer skips rows of a list by their numbers; where rows are",
        "streamed it reads and processes all that come before.",
        "",
        "| trainer | settings | imports | from there to the end of the first step |",
        "|---|---|---|---|",
    ]
    for way, one in resumed.found.items():
        first_step = f"{'over ' if one.is_over else ''}{one.first_step_seconds:.1f} s"
        cells = (TITLES[way[0]], way[1], f"{one.import_seconds:.1f} s", first_step)
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines += [f"* {TITLES[way[0]]}, {way[1]}: no figure: {reason}" for way, reason in resumed.reasons.items()]
    return [*lines, ""] if resumed.reasons else lines


def _table(results: Results) -> list[str]:
    lines = [
        "| trainer | settings | tokens/s | ours, packed / this | memory | imports | first step | first loss "
        "| checkpoint | stall |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for way in results.runs:
        ratio = results.ratio(("ours", "packing"), way)
        values = {name: results.median(way, name) for name in _FORMATS}
        cells = {name: "-" if values[name] is None else form.format(values[name]) for name, form in _FORMATS.items()}
        size = values["checkpoint_bytes"]
        cells["checkpoint_bytes"] = "-" if size is None else f"{size / 1e6:.1f} MB"
        shown = "-" if ratio is None else f"{ratio:.2f}"
        first, *others = cells.values()
        lines.append(f"| {TITLES[way[0]]} | {way[1]} | {first} | {shown} | {' | '.join(others)} |")
    return lines


_FORMATS = {
    "tokens_per_second": "{:,.0f}",
    "peak_mib": "{:,.0f} MiB",
    "import_seconds": "{:.1f} s",
    "first_step_seconds": "{:.1f} s",
    "first_loss": "{:.2f}",
    "checkpoint_bytes": "{:.0f}",
    "save_seconds": "{:.2f} s",
}


def _aims(report: Report) -> list[str]:
    lines = ["## Aims", ""]
    for figure in report.figures:
        if figure.has_aim:
            outcome = "met" if figure.is_met else "missed"
            lines.append(f"* {figure.name}: {figure.ratio:.2f} times (aim {figure.ratio_aim:g}): {outcome}")
    return lines
