"""`python -m tests.bench.flops`: operations as MFU counts them, beside what torch counts of forward and backward."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from tests.bench.report import ROOT, Report, write_page
from tests.unit.families.cells import _packed
from tests.unit.families.subjects import Subject, job, subject
from tests.unit.model.counted import CLIPS, EVERYWHERE, FAMILIES, LANGUAGE, PROJECTOR, TOWER, measured, trained
from vlm_dist.data.types import MicroBatch
from vlm_dist.model.attention.choice import varlen_refusal
from vlm_dist.model.checkpointing import base_model
from vlm_dist.model.flops import FlopModel, text_tokens

PAGE = ROOT / "docs" / "benchmarks" / "flops.md"
QUICK_FAMILIES = ("qwen2_vl", "llava")
AIM = 2.0  # percent


@dataclass(frozen=True)
class Setting:
    """What is trained, on what.

    Attributes:
        name: a column of the page.
        policy: of the towers.
        rows: "padded", "packed" or "clips".
        varlen: attention leaves out what is between the samples of a pack.
    """

    name: str
    policy: dict[str, str]
    rows: str = "padded"
    varlen: bool = False


SETTINGS = (
    Setting("language", LANGUAGE),
    Setting("language, projector in full", PROJECTOR),
    Setting("everywhere", EVERYWHERE),
    Setting("language, tower in full", TOWER),
    Setting("language, packs behind a mask", LANGUAGE, "packed"),
    Setting("everywhere, packs without a mask", EVERYWHERE, "packed", varlen=True),
    Setting("everywhere, clips", EVERYWHERE, "clips"),
)


def batch_of(one: Subject, setting: Setting) -> MicroBatch | None:
    """Samples of different lengths, with several pictures, one and none; None where the family has no such thing."""
    if setting.rows == "clips":
        return one.materialiser(kinds=("video",))(job("clip", "clip", "text")) if one.name in CLIPS else None
    if setting.rows == "padded":
        return one.materialiser()(job("wide", "text", "three"))
    if one.family.packing is None or (setting.varlen and varlen_refusal(one.model) is not None):
        return None
    return one.materialiser(packing=True)(_packed(job("wide", "text", "long")))


def unseen(model: Any, counter: FlopModel, batch: MicroBatch) -> float:
    """What torch counts and varlen leaves out: of each sample's attention, the half that looks ahead."""
    segments = text_tokens(batch.inputs, batch.labels).segments
    forwards = 0.0
    for attention in counter.attentions:
        if attention.kind == "causal":
            assert attention.window is None or attention.window >= max(segments), type(base_model(model)).__name__
            forwards += 4.0 * attention.width * (1 + 2.5 * attention.has_backward + attention.is_recomputed)
    return forwards * sum(length**2 for length in segments) / 2


def deviations(one: Subject, setting: Setting) -> Iterator[float]:
    """Percent by which the formulas are above torch's count, without and with gradient checkpointing."""
    batch = batch_of(one, setting)
    if batch is None:
        return
    for recomputed in (False, True):
        model = trained(one, setting.policy, recomputed=recomputed, varlen=setting.varlen)
        counter = FlopModel.of(model)
        counted = counter.count(batch.inputs, batch.labels).hardware
        if setting.varlen:
            counted += unseen(model, counter, batch)
        yield 100 * (counted / measured(model, batch) - 1)


def main() -> None:
    """Compare, print, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two families, and no page")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    report = Report()
    rows = []
    for name in QUICK_FAMILIES if quick else FAMILIES:
        cells = []
        for setting in SETTINGS:
            found = list(deviations(subject(name), setting))
            if not found:
                cells.append("—")
                continue
            largest = max(found, key=abs)
            report.add(f"{name}/{setting.name}", abs(largest), "% off", AIM)
            cells.append(f"{largest:+.2f}%" if abs(largest) >= 0.005 else "0.00%")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    report.summarise()
    if not quick:
        write_page(PAGE, "Operations", "make bench-flops", ["torch", "transformers", "peft"], body(report, rows))


def body(report: Report, rows: list[str]) -> str:
    """Of the page."""
    met = sum(figure.is_met for figure in report.figures)
    worst = max(report.figures, key=lambda figure: figure.value)
    names = [setting.name for setting in SETTINGS]
    return "\n".join(
        [
            "MFU is made of formulas ([estimate.md](../estimate.md)): operations are worked out from the shapes of",
            "each micro-batch, and nothing of it runs. Here they are compared with what `torch.utils.flop_counter`",
            "counts while a tiny model of each family, loaded and made ready as a run does it, goes forward and",
            "backward with the loss of this project: what is computed, with padding and what is computed again (HFU;",
            "MFU has the same products without those). Each figure is the larger deviation of two, without and with",
            "gradient checkpointing. Micro-batches have three samples of different lengths, with several pictures,",
            "one and none; in the last column two clips and a text.",
            "",
            "LoRA is where the column says; what it does not name is frozen.",
            "",
            "| family | " + " | ".join(names) + " |",
            "|---|" + "---|" * len(names),
            *rows,
            "",
            f"Aim: within {AIM:g} %. Met by {met} of {len(report.figures)}; the largest deviation is"
            f" {worst.value:.2f} % ({worst.name}). —: the family cannot be packed, or sees no clips.",
            "",
            "Torch counts the whole square of causal attention, also where a kernel computes half of it. Without a",
            "mask the formulas count that half; in that column the other one is added to them for the comparison. In",
            "neither count: norms, activation functions, rotary positions, the optimizer.",
        ]
    )


if __name__ == "__main__":
    main()
