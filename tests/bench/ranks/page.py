"""The page docs/benchmarks/ranks.md."""

from __future__ import annotations

from collections.abc import Mapping

from tests.bench.ranks.figures import MODEL, Figures, TimeModel
from tests.bench.report import Report

OURS = ("padding", "group_by_length", "packing")
THEIRS = ("Trainer's random", "Trainer's group_by_length", "Trainer's batch_rebalance")
NAMES = (*OURS, *THEIRS)

_HEADS = (
    "padding",
    "tokens max/mean",
    "tiles max/mean",
    "useful share",
    "waiting each micro-batch",
    "useful time",
    "seconds to cut a step",
)


def page(
    found: Mapping[tuple[str, int, tuple[int, int], str], Figures | None], report: Report, model: TimeModel
) -> str:
    """The body of the page."""
    lines = [
        "Simulated: no model runs. Steps are cut by our planner, and by the samplers of Hugging Face's Trainer (its",
        "own code, dealt to the ranks as accelerate does); what each rank computes is added up. The mixes of lengths",
        "are those of `tests/bench/lengths.py`; packs hold up to 16,384 tokens.",
        "",
        "* padding: pad tokens / computed tokens.",
        "* max/mean: what the slowest rank of a step computes / the mean of the ranks; tiles (448 x 448 pixels) are",
        "  what the vision tower sees.",
        "* useful share: tokens of samples / (ranks x computed tokens of the slowest rank), where ranks wait for each",
        "  other once a step (ZeRO-1), and after every micro-batch (ZeRO-2 and 3).",
        f"* useful time: the same with operations of a {MODEL} (LoRA on the language model, frozen tower) in the place",
        f"  of tokens, waiting after every micro-batch: {model.token / 1e9:.1f} GFLOP a token, {model.pair / 1e6:.2f}",
        f"  MFLOP times the square of a row's length, {model.tile / 1e12:.2f} TFLOP a tile.",
        "",
        "A step of packs has any samples, a grouped one has samples of like lengths: where a single long video",
        "outweighs all that another rank has, only grouping helps, or a larger step.",
        "",
    ]
    settings = dict.fromkeys((world_size, shape) for _, world_size, shape, _ in found)
    for mix in dict.fromkeys(mix for mix, *_ in found):
        lines += [
            f"## {mix[0].upper()}{mix[1:]}",
            "",
            f"| ranks | samples x accumulation | micro-batches | {' | '.join(_HEADS)} |",
        ]
        lines.append("|" + "---|" * (3 + len(_HEADS)))
        for world_size, shape in settings:
            for name in NAMES:
                cells = _cells(found[mix, world_size, shape, name])
                lines.append(f"| {world_size} | {shape[0]} x {shape[1]} | {name} | {cells} |")
        lines.append("")
    return "\n".join([*lines, *_aims(report)])


def _cells(figures: Figures | None) -> str:
    if figures is None:
        return " | ".join(["-"] * (len(_HEADS) - 1) + ["over 90"])
    shares = f"{figures.useful:.1%} | {figures.useful_each:.1%} | {figures.useful_time:.1%}"
    balance = f"{figures.max_over_mean:.3f} | {figures.tiles_max_over_mean:.3f}"
    return f"{figures.padding:.1%} | {balance} | {shares} | {figures.plan_seconds:.3f}"


def _aims(report: Report) -> list[str]:
    """What was aimed at, and what came out."""
    with_aim = [figure for figure in report.figures if figure.has_aim]
    lines = ["## Aims", "", "Useful share of our packs / that of Trainer's way:", ""]
    grouped = [figure for figure in with_aim if figure.peer is not None and figure.peer.endswith("group_by_length")]
    for figure in grouped:
        lines.append(f"* {figure.name}: {figure.ratio:.2f} (aim {figure.ratio_aim:g})")
    others = [figure for figure in with_aim if figure not in grouped]
    if others:
        lowest = min(others, key=lambda figure: figure.ratio or 0.0)
        lines.append(
            f"* batch_rebalance, {len(others)} settings, above 1 everywhere is the aim: lowest {lowest.ratio:.3f} "
            f"({lowest.name}), highest {max(figure.ratio or 0.0 for figure in others):.2f}"
        )
    missed = [figure.name for figure in with_aim if not figure.is_met]
    return [*lines, "", f"Missed: {'; '.join(missed)}." if missed else "All aims are met."]
