"""The page of a benchmark on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.gpu.kernels import KernelTable
from tests.bench.gpu.machine import Machine
from tests.bench.gpu.ours import Measured
from tests.bench.report import ROOT, Report, write_page

FILES = {"Qwen2-VL-2B": "gpu-2b", "Qwen2.5-VL-7B": "gpu-7b"}
_WHAT = {"8k": "pictures and texts, packs of 8k", "16k": "the same, packs of 16k", "video": "clips, packs of 8k"}


def write(
    name: str,
    machine: Machine,
    report: Report,
    runs: Mapping[str, Measured],
    peers: Mapping[str, Mapping[str, Any]],
    table: KernelTable | None,
    notes: Sequence[str],
    path: Path | None = None,
) -> Path:
    """Write the page, and give back where.

    Args:
        name: of the model.
        machine: that it was measured on.
        report: figures with aims.
        runs: ours.
        peers: result of each.
        table: kernels of a step of ours.
        notes: what went wrong.
        path: of the page; None: that of the model.
    """
    file = FILES[name]
    packages = [package for package in ("torch", "transformers", "deepspeed", "peft") if package in machine.packages]
    body = "\n".join(
        [*_head(name, machine), *_runs(runs), *_peers(runs, peers), *_aims(report), *_kernels(table), *_notes(notes)]
    )
    target = path or ROOT / "docs" / "benchmarks" / f"{file}.md"
    write_page(target, f"{name} on a GPU", f"make {file}", packages, body)
    return target


def _head(name: str, machine: Machine) -> list[str]:
    memory = f", {machine.memory_gib:.0f} GiB each" if machine.memory_gib else ""
    ceiling = ""
    if machine.peak_tflops and machine.measured_tflops:
        ceiling = (
            f" Peak by the data sheet, which MFU is a share of: {machine.peak_tflops:.0f} TFLOP/s in bfloat16; a "
            f"matrix product of 8192 x 8192 reaches {machine.measured_tflops:.0f}."
        )
    others = ", ".join(f"{package} {version}" for package, version in machine.packages.items())
    return [
        f"{name} with random weights at its published sizes, LoRA of rank 16 on the language model, frozen tower,",
        "bfloat16, ZeRO-2, loss on the answers. "
        f"{machine.count} x {machine.device}{memory}, {machine.cores} cores.{ceiling}",
        f"Packages: {others}.",
        "",
        "Samples: pictures and texts in equal parts, with the lengths of `tests/bench/lengths.csv`. Each process runs",
        "by itself, one after the other; figures are those of the timed steps behind three that warm up.",
        "",
    ]


def _runs(runs: Mapping[str, Measured]) -> list[str]:
    lines = [
        "## Ours",
        "",
        "| samples | useful tokens/s | MFU | HFU | memory (reserved) | data wait | step | by `vlm-dist estimate` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for part, found in runs.items():
        speed = found.tokens_per_second
        if speed is None:
            lines.append(f"| {_WHAT[part]} | none: exit code {found.outcome.exit_code} | | | | | | |")
            continue
        peak = f"{found.peak_bytes / 1e9:.1f} GB" if found.peak_bytes else ""
        lines.append(
            f"| {_WHAT[part]} | {speed:,.0f} | {_share(found.median('mfu'))} | {_share(found.median('hfu'))} | {peak} "
            f"| {_share(found.median('data_wait_share'))} | {found.median('step_seconds') or 0:.2f} s "
            f"| {', '.join(found.settings) or 'all blocks recomputed'} |"
        )
    return [*lines, ""]


def _peers(runs: Mapping[str, Measured], peers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    own = runs["8k"].tokens_per_second if "8k" in runs else None
    lines = [
        "## Beside them",
        "",
        "Same samples, same LoRA, loss on the answers; grouped by length, as neither packs samples with pictures. Of",
        "gradient checkpointing and rows per micro-batch the first that fits, the fastest being tried first.",
        "",
        "| trainer | useful tokens/s | ours is | memory (reserved) | rows | checkpointing | Liger | attention |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in peers.items():
        speed = found.get("tokens_per_second")
        if speed is None:
            lines.append(f"| {name} | none | | | | | | |")
            continue
        ratio = f"{own / speed:.2f} x" if own else ""
        lines.append(
            f"| {name} | {speed:,.0f} | {ratio} | {found['peak_bytes'] / 1e9:.1f} GB | {found['rows']} "
            f"| {_yes(found['checkpointing'])} | {_yes(found['liger'])} | {found['attention']} |"
        )
    return [*lines, ""]


def _aims(report: Report) -> list[str]:
    with_aim = [figure for figure in report.figures if figure.has_aim]
    lines = ["## Aims", "", "| figure | value | aim | |", "|---|---|---|---|"]
    for figure in with_aim:
        has_ratio = figure.ratio_aim is not None and figure.ratio is not None
        value = f"{figure.ratio:.2f} x" if has_ratio else f"{figure.value:.4g}"
        verdict = "met" if figure.is_met else "missed"
        lines.append(f"| {figure.name} | {value} {figure.unit} | {figure.line['aim']} | {verdict} |")
    return [*lines, ""]


def _kernels(table: KernelTable | None) -> list[str]:
    if table is None or not table.seconds:
        return []
    longest = [f"| `{name[:90]}` | {seconds * 1e3:.1f} | {count} |" for name, seconds, count in table.longest]
    return [
        "## Where a step's time goes",
        "",
        "One traced step of ours, packs of 8k.",
        "",
        *table.lines,
        "",
        "| longest kernels | ms | calls |",
        "|---|---|---|",
        *longest,
        "",
    ]


def _notes(notes: Sequence[str]) -> list[str]:
    if not notes:
        return []
    return ["## What did not go as planned", "", *(f"* {note.splitlines()[0]}" for note in notes), ""]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
