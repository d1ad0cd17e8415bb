"""The tables of docs/benchmarks/nodes.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlm_dist.distributed.zero_traffic import Traffic

#: One that a user may have: 7B, LoRA of r 16 on all linear layers, 8 micro-batches a step, over NCCL.
LARGE = Traffic(stage=2, num_ranks=2, accumulation=8, num_trained=40_000_000, num_gathered=7_600_000_000)
LARGE_LINKS = {"1 Gbit/s": 1e9, "10 Gbit/s": 10e9, "100 Gbit/s": 100e9, "400 Gbit/s": 400e9}
LARGE_NODES = (2, 8, 64)
#: Of a node.
LARGE_RANKS = 8

#: Layout, bytes and seconds of a step by rate.
Row = tuple[Traffic, Mapping[str, float], Mapping[str, float]]


def page(rows: Sequence[Row], rates: Mapping[str, float], unshaped: str) -> str:
    """The body of the page.

    Args:
        rows: all that was measured.
        rates: of the shaped links in bit/s, by name.
        unshaped: name of the links as they are.
    """
    return "\n".join([*_bytes(rows, unshaped), *_seconds(rows, rates, unshaped), *_scaling(rows, rates), *_large()])


def _bytes(rows: Sequence[Row], unshaped: str) -> list[str]:
    layout = rows[0][0]
    lines = [
        "Whole runs of `slurm/train.sbatch` on the tests' Slurm cluster, one rank a node, bfloat16, gloo: a Qwen2-VL",
        f"of {layout.num_gathered / 1e6:.1f} M elements that ZeRO-3 cuts, LoRA of {layout.num_trained / 1e6:.2f} M, "
        f"{layout.accumulation} micro-batches a step. Which stage a network bears is told at the end.",
        "",
        "## Bytes that each node sends in an optimizer step",
        "",
        "By the counters of the nodes' network devices, votes, heartbeats and Slurm's own traffic included, beside the",
        "formula of `vlm_dist/distributed/zero_traffic.py`. n: elements that are trained; N: of the base that are",
        "cut; A: micro-batches; W: ranks, here one a node;",
        "gradients are summed in float32 (4 B), weights are sent in bfloat16 (2 B).",
        "",
        "| stage | formula, x (W-1)/W | nodes | sent | formula | sent / formula |",
        "|---|---|---|---|---|---|",
    ]
    terms = {1: "8n + 2n", 2: "A 8n + 2n", 3: "A (4n + 4N) + 2n; gloo: A (8n + 4N) + 2n"}
    for layout, sent, _ in sorted(rows, key=lambda row: (row[0].stage, row[0].num_ranks)):
        if layout.num_ranks == 1:
            continue
        formula = layout.sent_bytes
        lines.append(
            f"| ZeRO-{layout.stage} | {terms[layout.stage]} | {layout.num_ranks} | {sent[unshaped] / 1e6:.2f} MB "
            f"| {formula / 1e6:.2f} MB | {sent[unshaped] / formula:.3f} |"
        )
    return [
        *lines,
        "",
        "ZeRO-3: DeepSpeed's limits of live parameters are 0 here, in proportion to the model; torch's gloo does a",
        "reduce-scatter as an all-reduce, NCCL does not. Gradient checkpointing adds no third gather.",
        "",
    ]


def _seconds(rows: Sequence[Row], rates: Mapping[str, float], unshaped: str) -> list[str]:
    lines = [
        "## Seconds of a step that the network costs",
        "",
        "Median step at links of that rate (`tc`, changed while the run trains; the order of rates is that of the",
        "columns) less the median step at links as they are. In brackets the bytes divided by the rate; less is waited",
        "where that hides behind computation, or is part of the first step, too. All nodes share the cores of one",
        "machine, whose steps differ by more than the fastest link costs: a figure near 0 is noise. Delay and loss of",
        "packets cannot be shaped here.",
        "",
        "| stage | nodes | step, links as they are | " + " | ".join(rates) + " |",
        "|---|---|---|" + "---|" * len(rates),
    ]
    for layout, sent, seconds in sorted(rows, key=lambda row: (row[0].stage, row[0].num_ranks)):
        cells = [
            f"{seconds[name] - seconds[unshaped]:.2f} s ({8 * sent[name] / rate:.2f})" if name in seconds else "-"
            for name, rate in rates.items()
        ]
        lines.append(
            f"| ZeRO-{layout.stage} | {layout.num_ranks} | {seconds[unshaped]:.2f} s | " + " | ".join(cells) + " |"
        )
    return [*lines, ""]


def _scaling(rows: Sequence[Row], rates: Mapping[str, float]) -> list[str]:
    """Of the measured model."""
    alone = {layout.stage: next(iter(seconds.values())) for layout, _, seconds in rows if layout.num_ranks == 1}
    lines = [
        "## Scaling, computed",
        "",
        "Not measured: throughput of N nodes over N times that of one, if each had this machine's cores for itself:",
        "the step of one node, over that step and the bytes divided by the rate. So small a model computes for a tenth",
        "of a second; what it sends grows with its parameters, what it computes with their product with the tokens.",
        "",
        "| stage | nodes | " + " | ".join(rates) + " |",
        "|---|---|" + "---|" * len(rates),
    ]
    for layout, sent, _ in sorted(rows, key=lambda row: (row[0].stage, row[0].num_ranks)):
        if layout.num_ranks == 1 or layout.stage not in alone:
            continue
        step = alone[layout.stage]
        cells = [f"{step / (step + 8 * next(iter(sent.values())) / rate):.0%}" for rate in rates.values()]
        lines.append(f"| ZeRO-{layout.stage} | {layout.num_ranks} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _large() -> list[str]:
    """Of a model that is not here."""
    variants = {
        "ZeRO-1": replace(LARGE, stage=1),
        "ZeRO-2": LARGE,
        "ZeRO-3": replace(LARGE, stage=3),
        "ZeRO-3, hpZ": replace(LARGE, stage=3, keeps_base_in_node=True),
    }
    lines = [
        "## Which stage a network bears, computed",
        "",
        f"Not measured: seconds of communication in an optimizer step, by the formula, for a base of "
        f"{LARGE.num_gathered / 1e9:.1f} B elements,",
        f"LoRA of {LARGE.num_trained / 1e6:.0f} M, {LARGE.accumulation} micro-batches a step, NCCL; the rate is that "
        "of a node's links together. Compare it with",
        "the seconds that your step computes: what does not hide behind them is lost.",
        "",
        "| stage | nodes | sent by a node | " + " | ".join(LARGE_LINKS) + " |",
        "|---|---|---|" + "---|" * len(LARGE_LINKS),
    ]
    for name, variant in variants.items():
        for num_nodes in LARGE_NODES:
            sent = replace(variant, num_ranks=LARGE_RANKS * num_nodes).sent_bytes
            cells = [f"{8 * sent / rate:.3g} s" for rate in LARGE_LINKS.values()]
            lines.append(f"| {name} | {num_nodes} | {sent / 1e9:.3g} GB | " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        "* **A model that fits one GPU: ZeRO-2, or ZeRO-1 where a step has several micro-batches**",
        "  (`ds_configs/zero1.json`): with LoRA both send so little that 10 Gbit/s will do.",
        "* **A model that does not: ZeRO-3 with hpZ**, which is switched on by itself where several ranks share a node",
        "  (`ds_configs/zero3_hpz.json`): the base is then gathered inside each node.",
        "* Plain ZeRO-3 between nodes needs hundreds of Gbit/s, and more micro-batches make it worse.",
    ]
