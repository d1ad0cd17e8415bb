"""The estimate as text for people, and as JSON."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any, TextIO

from vlm_dist.estimate.advice import Advice
from vlm_dist.estimate.batch import BatchShape
from vlm_dist.estimate.estimate import Estimate, Row
from vlm_dist.estimate.memory import GIB, PARTS

#: Width of the tables; a narrower terminal wraps them.
_WIDTH = 118
_SHORT = ("base", "adapter", "optim", "grads", "activ", "vision", "logits", "buffers", "frame")


def show(made: Estimate, advice: Advice, stream: TextIO | None = None) -> None:
    """Print the estimate: tables with colours on a terminal, plain ones elsewhere."""
    from rich.console import Console

    stream = stream or sys.stdout
    width = max(_WIDTH, Console(file=stream).width) if stream.isatty() else _WIDTH
    console = Console(file=stream, highlight=False, width=width)
    for line in _head(made):
        console.print(line, markup=False, soft_wrap=True)
    console.print()
    console.print(_memory_table(made))
    console.print(_time_table(made))
    for line in _legend(made):
        console.print(line, markup=False, soft_wrap=True)
    for line in _assumptions(made):
        console.print(line, markup=False, soft_wrap=True)
    console.print()
    console.print(f"Recommendation: {advice.text}", markup=False, soft_wrap=True)
    for setting in advice.settings:
        console.print(f"  --set {setting}", markup=False, soft_wrap=True)


def as_json(made: Estimate, advice: Advice) -> dict[str, Any]:
    """The same as figures: bytes, seconds, counts."""
    return {
        "model": made.config.model_id,
        "machine": {
            "gpus_per_node": made.machine.ranks.num_gpus,
            "nodes": made.machine.ranks.num_nodes,
            "gpu": made.machine.gpu,
            "gpu_memory_bytes": made.machine.memory_bytes,
            "peak_flops": made.machine.peak,
            "efficiency": made.machine.efficiency,
            "interconnect": made.machine.link,
        },
        "weights": {
            "total": made.weights.num_frozen + made.weights.num_trained,
            "trained": made.weights.num_trained,
            "by_tower": {tower: {"total": n, "trained": t} for tower, (n, t) in made.weights.by_tower.items()},
        },
        "largest_micro_batch": _shape_json(made.shapes.largest),
        "typical_micro_batch": _shape_json(made.shapes.typical) if made.shapes.typical is not None else None,
        "micro_batches_per_step": made.shapes.micro_batches,
        "steps": made.shapes.num_steps,
        "variants": [_row_json(made, row) for row in made.rows],
        "recommendation": asdict(advice),
        "assumptions": list(_assumptions(made)),
    }


def _head(made: Estimate) -> list[str]:
    weights, shapes, ranks = made.weights, made.shapes, made.machine.ranks
    nodes = f"{ranks.num_nodes} x " if ranks.num_nodes > 1 else ""
    lines = [
        f"{made.config.model_id}: {(weights.num_frozen + weights.num_trained) / 1e9:.2f}e9 weights, "
        f"{weights.num_trained / 1e6:.1f}e6 of them trained; on {nodes}{ranks.num_gpus} x {made.machine.gpu} with "
        f"{made.machine.memory_bytes / GIB:g} GiB, over {made.machine.link}",
        str(made.batch),
        f"largest micro-batch: {_shape_words(shapes.largest)}",
    ]
    if shapes.typical is not None:
        lines.append(
            f"typical micro-batch: {_shape_words(shapes.typical)}; {shapes.micro_batches:.3g} of them in a step"
        )
    return lines


def _shape_words(shape: BatchShape) -> str:
    patches = shape.visual.streams.get("patches", 0.0)
    seen = f", {patches:,.0f} patches" if patches else ""
    form = "packed into a row of" if shape.is_packed else "in"
    return f"{shape.num_samples:.3g} samples {form} {shape.text.computed:,} tokens{seen}"


def _memory_table(made: Estimate) -> Any:
    table = _empty("GiB of one GPU", *_SHORT, "sum", "fits")
    for row in made.rows:
        sizes = [f"{row.largest.parts[part] / GIB:.1f}" for part in PARTS]
        table.add_row(_name(row), *sizes, f"{row.largest.total / GIB:.1f}", _fits(made, row), style=_style(row))
    return table


def _time_table(made: Estimate) -> Any:
    table = _empty(
        "",
        "typical GiB",
        "max pack" if made.shapes.unit.is_packed else "max batch",
        "s per step",
        "of it traffic",
        "MFU",
        "tokens/s",
        "hours",
    )
    for row in made.rows:
        seconds = row.time.total
        table.add_row(
            _name(row),
            f"{row.typical.total / GIB:.1f}" if row.typical is not None else "-",
            f"{row.largest_units:,}",
            f"{seconds:.3g}",
            f"{row.time.sending:.2g}",
            f"{utilisation(made, row):.0%}",
            f"{tokens_per_second(made, row):,.0f}",
            "-" if made.shapes.num_steps is None else f"{made.shapes.num_steps * seconds / 3600:.3g}",
            style=_style(row),
        )
    return table


def _empty(*names: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def _name(row: Row) -> str:
    again = "recomputed" if row.variant.recomputes else "kept"
    if row.variant.first_blocks is not None:
        again = f"first {row.variant.first_blocks} again"
    return f"{'*' if row.is_run else ' '} {row.variant.name}, {again}"


def _fits(made: Estimate, row: Row) -> str:
    if row.fits:
        return "yes"
    return "tight" if row.largest.total <= made.machine.memory_bytes else "no"


def _style(row: Row) -> str:
    return "bold" if row.is_run else "" if row.fits else "dim"


def tokens_per_second(made: Estimate, row: Row) -> float:
    """Tokens without padding, of all ranks."""
    tokens = made.timed.text.real * made.shapes.micro_batches * made.machine.ranks.world_size
    return tokens / max(row.time.total, 1e-9)


def utilisation(made: Estimate, row: Row) -> float:
    """MFU: operations that the samples need, as a share of the peak."""
    return row.flops.model * made.shapes.micro_batches / max(row.time.total, 1e-9) / made.machine.peak


def _legend(made: Estimate) -> list[str]:
    whole = [row for row in made.rows if row.variant.first_blocks is None]
    moments = sorted({f"{'recomputed' if row.variant.recomputes else 'kept'}: {row.largest.moment}" for row in whole})
    return [
        "* as the run file has it; kept, recomputed: without and with gradient checkpointing; first N again: of the "
        "first N blocks of the language model; max batch (pack): samples per device (tokens) that fit; tight: above "
        "95%, where an estimate is no promise",
        f"GiB at the largest micro-batch, in the worst moment of its step ({'; '.join(moments)})",
    ]


def _assumptions(made: Estimate) -> list[str]:
    machine = made.machine
    policy = made.config.train.gradient_checkpointing_policy
    lines = [
        f"assumed: {machine.efficiency:.0%} of {machine.peak / 1e12:.0f} TFLOP/s, recomputation included "
        "(--efficiency); traffic beside the computation; data in time; 1.5 GiB for CUDA and NCCL; 5% of activations "
        "lost in pieces",
        f"recomputed: language {policy.language}, vision {policy.vision} (train.gradient_checkpointing_policy); kept: "
        "no block is computed again",
    ]
    if made.shapes.typical is None:
        lines.append("steps are timed with the largest micro-batch, which is slower than the typical one")
    lines += [f"notice: {note}" for note in made.shapes.notes]
    return lines


def _shape_json(shape: BatchShape) -> dict[str, Any]:
    return {
        "samples": shape.num_samples,
        "rows": shape.rows,
        "tokens": shape.text.computed,
        "tokens_without_padding": shape.text.real,
        "patches": shape.visual.streams.get("patches", 0.0),
        "labelled": shape.num_labelled,
        "packed": shape.is_packed,
    }


def _row_json(made: Estimate, row: Row) -> dict[str, Any]:
    return {
        "name": row.variant.name,
        **asdict(row.variant),
        "as_the_run_file": row.is_run,
        "largest_bytes": dict(row.largest.parts),
        "largest_total_bytes": row.largest.total,
        "worst_moment": row.largest.moment,
        "typical_total_bytes": row.typical.total if row.typical is not None else None,
        "host_bytes": row.largest.host,
        "fits": row.fits,
        "largest_per_device_batch": None if made.shapes.unit.is_packed else row.largest_units,
        "largest_pack_tokens": row.largest_units if made.shapes.unit.is_packed else None,
        "step_seconds": row.time.total,
        "compute_seconds": row.time.compute,
        "traffic_seconds": row.time.sending,
        "model_flops_per_micro_batch": row.flops.model,
        "hardware_flops_per_micro_batch": row.flops.hardware,
        "tokens_per_second": tokens_per_second(made, row),
        "mfu": utilisation(made, row),
        "hours": None if made.shapes.num_steps is None else made.shapes.num_steps * row.time.total / 3600,
    }
