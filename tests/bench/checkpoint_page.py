"""The tables of docs/benchmarks/checkpoint.md."""

from __future__ import annotations

from collections.abc import Sequence

from tests.bench.report import Report

MEGA = 1e6


def page(report: Report, rank_counts: Sequence[int]) -> str:
    """The body of the page."""
    lines = [
        "A tiny Qwen2-VL with LoRA, ZeRO-2, float32, gloo. All ranks share the cores, so that the time of a step and",
        "the stall grow with them; what counts is their ratio. DeepSpeed's own `save_checkpoint` of the same model",
        "(`exclude_frozen_parameters=True`) is the peer: all its time is a stall, and nothing is hashed or fsynced.",
        "",
        "| ranks | trained | checkpoint | per element | aim | DeepSpeed's |",
        "|---|---|---|---|---|---|",
    ]
    for count in rank_counts:
        trained = report.find(f"{count} ranks/trainable elements").value
        size = report.find(f"{count} ranks/bytes")
        assert size.aim is not None and size.peer_value is not None
        lines.append(
            f"| {count} | {trained / MEGA:.2f} M | {size.value / MEGA:.2f} MB | {size.value / trained:.2f} B | "
            f"<= {size.aim / MEGA:.2f} MB | {size.peer_value / MEGA:.2f} MB |"
        )
    lines += [
        "",
        "The stall is what the loop waits for: collecting the state, and the save before, where it is still being",
        "written. Medians of the saves.",
        "",
        "| ranks | step | stall | in steps | aim | worst | written in the thread in | DeepSpeed's stall |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for count in rank_counts:
        stall = report.find(f"{count} ranks/stall")
        assert stall.aim is not None and stall.peer_value is not None
        step, steps, worst, written = (
            report.find(f"{count} ranks/{name}").value
            for name in ("step", "stall in steps", "worst stall", "written in")
        )
        lines.append(
            f"| {count} | {step * 1000:.0f} ms | {stall.value * 1000:.0f} ms | {steps:.2f} "
            f"| <= {stall.aim * 1000:.0f} ms | {worst * 1000:.0f} ms | {written:.2f} s "
            f"| {stall.peer_value * 1000:.0f} ms |"
        )
    lines += [
        "",
        "Resuming: to verify every hash, to read, and to bring the state to all ranks, with the engine there. It does",
        "not depend on the position; that the plan does not either is in [scale.md](scale.md). The checkpoint was",
        "written by one rank.",
        "",
        "| ranks | at 10% | at 50% | at 90% |",
        "|---|---|---|---|",
    ]
    for count in rank_counts:
        cells = [f"{report.find(f'{count} ranks/resume at {share}').value:.2f} s" for share in ("10%", "50%", "90%")]
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
