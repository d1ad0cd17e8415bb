"""The page of a campaign, and the choice of faults for the ordinary tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tests.chaos.faults import Fault, make_faults

if TYPE_CHECKING:
    from tests.chaos.campaign import Row

#: Kinds of which the ordinary tests try the first fault; each takes a few seconds.
SHORT_KINDS = ("rank killed", "SIGUSR1", "disk full", "checkpoint damaged at rest", "resumed on another layout")


def short(seed: int) -> list[Fault]:
    """The first fault of a few kinds."""
    chosen = []
    for name in SHORT_KINDS:
        chosen.append(next(fault for fault in make_faults(seed, name) if fault.kind == name))
    return chosen


def write(rows: Sequence[Row], seed: int, seconds: float) -> None:
    """Write docs/benchmarks/chaos.md."""
    from tests.bench.report import ROOT, write_page

    packages = ("torch", "deepspeed", "transformers", "peft")
    command = f"make chaos SEED={seed}"
    write_page(ROOT / "docs" / "benchmarks" / "chaos.md", "Faults", command, packages, body(rows, seconds))


def body(rows: Sequence[Row], seconds: float) -> str:
    """What it means, a table by kind, and a table of all faults."""
    survived = sum(row.survived for row in rows)
    by_command = sum(row.fault.layout.command_line for row in rows)
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row.fault.kind, []).append(row)
    lines = [
        f"{len(rows)} faults of {len(kinds)} kinds, {by_command} of them through `deepspeed --num_gpus 2 -m "
        f"vlm_dist.train`, the others in plain processes; {survived} survived. {seconds / 60:.0f} minutes.",
        "",
        "A fault is survived if the run goes on, or ends by itself and is complete after restarts with "
        "`train.resume=auto`, and if then all of this holds: the final adapter, the float32 masters and the moments of "
        "Adam are those of the undisturbed run, bit for bit (to rounding where the number of ranks or the ZeRO stage "
        "changed); so are the losses of all steps; the sample ledger, which the trainer writes from what came with the "
        "tensors of applied steps, names the same samples in the same steps; no more steps were lost than since the "
        "last checkpoint that was sound; no process was left; no half-written directory was left; exit codes and "
        "messages were as they should be.",
        "",
        "Seconds to detect: from the fault until every process of the run was gone.",
        "",
        "| kind | faults | survived | most steps lost | seconds to detect, worst |",
        "|---|---|---|---|---|",
    ]
    for kind, of_kind in kinds.items():
        seen = [row.seconds_to_detect for row in of_kind if row.seconds_to_detect is not None]
        lines.append(
            f"| {kind} | {len(of_kind)} | {sum(row.survived for row in of_kind)} | {max(row.lost for row in of_kind)} "
            f"| {f'{max(seen):.1f}' if seen else 'went on'} |"
        )
    lines += ["", "| fault | processes | survived | steps lost | seconds to detect |", "|---|---|---|---|---|"]
    for row in rows:
        how = row.how if row.survived else f"**no**: {row.how}"
        seen_text = "-" if row.seconds_to_detect is None else f"{row.seconds_to_detect:.1f}"
        cells = (row.fault.what, str(row.fault.layout), how, str(row.lost), seen_text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
