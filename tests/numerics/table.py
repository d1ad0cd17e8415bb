"""The table of invariances: one gradient, however many ranks, ZeRO stages and cuts there are.

Every row is a whole run on forked ranks, built as the command line builds it. What it is compared with knows nothing of
the project: transformers, peft and cross-entropy, in float32, sample by sample, without padding, dummies or ranks. The
steps' samples alone are asked of the plan.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import chdir
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import Qwen2VLForConditionalGeneration

from tests.numerics.in_process import run_here, weights_for
from tests.numerics.mixed_data import ALL_SOURCES, make_mixed_run
from tests.ranks import Ranks, run_ranks
from tests.tiny_run import TinyRun
from vlm_dist.build import make_lengths, make_materialisers, make_plan, make_processor, open_sources_alone
from vlm_dist.config import load_run
from vlm_dist.config.arithmetic import resolve_batch
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.types import MicroBatchJob

GLOBAL_BATCH_SIZE = 8
NUM_SAMPLES = {"images": 9, "clips": 4, "albums": 4, "texts": 4}
NUM_STEPS = 3  # an epoch: the last step has empty slots
NUM_CURVE_STEPS = 9
CURVE_RATE = 1e-3

#: Per parameter tensor, ||g - reference|| / ||reference||; the largest of all tensors and steps counts.
MAX_GRADIENT_DIFFERENCE = 1e-5
#: |loss - reference| / reference, in float32.
MAX_LOSS_DIFFERENCE = 1e-6
#: The same in bfloat16, against the float32 curve, of every step.
MAX_CURVE_DIFFERENCE = 0.02

WORLD_SIZES = (1, 2, 4)
STAGES = (0, 1, 2, 3)
MODES = {
    "padding": ("train.group_by_length=false",),
    "group_by_length": ("train.group_by_length=true",),
    "packing": ("train.group_by_length=false", "train.packing=true", "train.pack_max_tokens=200"),
}
COMMON = (
    *ALL_SOURCES,
    "peft.lora_dropout=0",
    "train.gradient_checkpointing=false",
    "train.lr_scheduler_type=constant",
    "train.warmup_ratio=0",
    "train.adam_epsilon=1e-6",
)
#: Too small to move any weight: every step's gradient is taken at the same point.
STILL = ("train.learning_rate=1e-30", "train.max_grad_norm=0", f"train.max_steps={NUM_STEPS}")
MOVING = (f"train.learning_rate={CURVE_RATE}", "train.max_grad_norm=0", f"train.max_steps={NUM_CURVE_STEPS}")
BF16 = ("train.bf16=true", "model.loading_params.torch_dtype=bfloat16")


@dataclass(frozen=True)
class Row:
    """One run of the table.

    Attributes:
        world_size: ranks.
        per_device: samples of a micro-batch.
        stage: of ZeRO.
        mode: how micro-batches are made.
        bf16: a loss curve in bfloat16 instead of gradients in float32.
    """

    world_size: int
    per_device: int
    stage: int
    mode: str
    bf16: bool = False

    @property
    def accumulation(self) -> int:
        """Such that the global batch is the same in all rows."""
        return GLOBAL_BATCH_SIZE // (self.per_device * self.world_size)

    @property
    def overrides(self) -> tuple[str, ...]:
        return (
            *COMMON,
            *MODES[self.mode],
            *((*MOVING, *BF16) if self.bf16 else STILL),
            f"deepspeed=ds_configs/z{self.stage}.json",
            f"train.per_device_train_batch_size={self.per_device}",
            f"train.gradient_accumulation_steps={self.accumulation}",
            f"train.output_dir=row-{self.world_size}-{self.per_device}-{self.stage}-{self.mode}-{self.bf16}",
        )


def rows() -> list[Row]:
    """All of them."""
    every = [Row(world, 2, stage, mode) for world in WORLD_SIZES for stage in STAGES for mode in MODES]
    cuts = [Row(world, per, 2, "padding") for world, per in ((1, 8), (1, 1), (2, 1), (2, 4), (4, 1))]
    curves = [Row(world, 2, 2, "padding", bf16=True) for world in WORLD_SIZES]
    curves += [Row(2, 2, stage, "padding", bf16=True) for stage in STAGES if stage != 2]
    packed = [Row(2, 2, stage, "packing", bf16=True) for stage in (2, 3)]
    return sorted(every + cuts + curves + packed, key=lambda row: row.world_size)


@dataclass(frozen=True)
class Measured:
    """What a row came to.

    Attributes:
        row: that it is of.
        gradient_difference: see `MAX_GRADIENT_DIFFERENCE`; None for a curve.
        worst: the parameter that it is of.
        loss_difference: the largest of all steps, relative.
        targets: tokens with loss in every step.
    """

    row: Row
    gradient_difference: float | None
    worst: str
    loss_difference: float
    targets: tuple[int, ...]

    @property
    def limit(self) -> float:
        return MAX_CURVE_DIFFERENCE if self.row.bf16 else MAX_GRADIENT_DIFFERENCE

    @property
    def is_good(self) -> bool:
        if self.gradient_difference is None:
            return self.loss_difference <= MAX_CURVE_DIFFERENCE
        return self.gradient_difference <= MAX_GRADIENT_DIFFERENCE and self.loss_difference <= MAX_LOSS_DIFFERENCE


@dataclass(frozen=True)
class Reference:
    """The plain loop's own figures, step by step."""

    losses: list[float]
    targets: list[int]
    gradients: list[dict[str, np.ndarray]]


def make_table_run(directory: Path) -> TinyRun:
    """The data and the DeepSpeed files; under ZeRO-3 every weight is partitioned."""
    run = make_mixed_run(directory, NUM_SAMPLES)
    for stage in (0, 1, 2, 3):
        zero: dict[str, Any] = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        (directory / "ds_configs" / f"z{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
    return run


def plain_loop(run: TinyRun, mode: str, *, moving: bool) -> Reference:
    """Every sample of every step alone, in float32.

    Args:
        run: with the data.
        mode: the order of its samples.
        moving: train with AdamW, else stay where the weights are.
    """
    with chdir(run.directory):
        config = load_run(run.config, (*COMMON, *MODES[mode], *(MOVING if moving else STILL)))
        sources = open_sources_alone(config, "train")
        processor, family = make_processor(config)
        materialise = make_materialisers(config, sources, [], processor, family)
        lengths = make_lengths(config, sources, processor, family, materialise)
        plan = make_plan(config, sources, resolve_batch(config.train, 1, GLOBAL_BATCH_SIZE), lengths)
        alone = Materialiser(sources, processor, family, config.collator, frozenset(), config.train.seed)
        model = plain_model(run)
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(weights.values(), lr=CURVE_RATE, eps=1e-6, weight_decay=0.0)
        found = Reference([], [], [])
        for step in plan.steps():
            refs = [ref for job in step.for_rank(0, 1) for ref in job.refs if ref is not None]
            samples = [alone(MicroBatchJob(step.step, index, (ref,))) for index, ref in enumerate(refs)]
            num_targets = sum(int((sample.labels[:, 1:] != -100).sum()) for sample in samples)
            total = 0.0
            for sample in samples:
                logits = model(**sample.inputs).logits
                loss = F.cross_entropy(logits[0, :-1], sample.labels[0, 1:], reduction="sum")
                (loss / num_targets).backward()
                total += float(loss.detach())
            found.losses.append(total / num_targets)
            found.targets.append(num_targets)
            zeros = {name: torch.zeros_like(p) for name, p in weights.items()}
            found.gradients.append(
                {name: (zeros[name] if p.grad is None else p.grad).numpy().copy() for name, p in weights.items()}
            )
            if moving:
                optimizer.step()
            optimizer.zero_grad()
        return found


def plain_model(run: TinyRun, target_modules: str = "all-linear") -> Any:
    """transformers and peft, at the weights where all runs of the table begin."""
    base = Qwen2VLForConditionalGeneration.from_pretrained(run.directory / "model", dtype=torch.float32)
    adapter = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=target_modules, task_type="CAUSAL_LM")
    model = get_peft_model(base, adapter)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = weights_for({name: p.shape for name, p in named.items()})
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(start[name])
    return model.train()


def _run_rows(ranks: Ranks, run: TinyRun, chosen: Sequence[Row]) -> list[Any]:
    found = []
    for row in chosen:
        seen = run_here(ranks, run, row.overrides, gradients=not row.bf16, anywhere=True)
        assert seen.error is None, (row, seen.error)
        found.append((seen.losses, seen.targets, seen.gradients))
    return found


def measure(run: TinyRun, chosen: Iterable[Row]) -> list[Measured]:
    """Run rows, one spawn of processes for each number of ranks, and compare them with the plain loop."""
    chosen = list(chosen)

    @cache
    def reference(order: str, moving: bool) -> Reference:
        return plain_loop(run, order, moving=moving)

    measured = []
    for world_size in WORLD_SIZES:
        mine = [row for row in chosen if row.world_size == world_size]
        by_rank = run_ranks(_run_rows, world_size, run, mine, timeout_seconds=400) if mine else []
        for index, row in enumerate(mine):
            order = "group_by_length" if row.mode == "group_by_length" else "padding"
            losses = np.sum([rank[index][0] for rank in by_rank], axis=0)
            measured.append(_compare(row, losses, *by_rank[0][index][1:], reference(order, row.bf16)))
    return measured


def _compare(row: Row, losses: Any, targets: list[int], gradients: list[Any], wanted: Reference) -> Measured:
    assert targets == wanted.targets, (row, targets, wanted.targets)
    means = losses / np.array(targets)
    loss_difference = float(np.max(np.abs(means - wanted.losses) / np.abs(wanted.losses)))
    worst, largest = "", None
    if not row.bf16:
        assert len(gradients) == len(wanted.gradients)
        differences = [
            (_relative(ours[name], theirs[name]), name)
            for ours, theirs in zip(gradients, wanted.gradients, strict=True)
            for name in theirs
        ]
        largest, worst = max(differences)
    return Measured(row, largest, worst, loss_difference, tuple(targets))


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Relative to the tensor's norm; a gradient that is zero must be zero."""
    difference, norm = float(np.linalg.norm(ours - theirs)), float(np.linalg.norm(theirs))
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))


def name_of(row: Row) -> str:
    """A row in a few words."""
    cut = f"{row.world_size} x {row.accumulation} x {row.per_device}"
    return f"{cut}, ZeRO-{row.stage}, {row.mode}{', bf16 curve' if row.bf16 else ''}"


def line(measured: Measured) -> str:
    """One row for people."""
    row = measured.row
    gradient = "" if row.bf16 else f"gradient {measured.gradient_difference:.1e}  "
    verdict = "" if measured.is_good else "  NOT EQUAL"
    return f"{name_of(row):<46} {gradient}loss {measured.loss_difference:.1e}{verdict}"
