"""All that a preview tells, ready to be written as a page or printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_dist.build import describe_plan
from vlm_dist.build.data import source_repeats
from vlm_dist.preview.batching import MAX_STEPS as BATCHING_STEPS
from vlm_dist.preview.batching import ModeFigures, measure_modes
from vlm_dist.preview.choosing import choose_samples
from vlm_dist.preview.lengths import Lengths, measure_lengths
from vlm_dist.preview.opening import OpenRun, open_run
from vlm_dist.preview.samples import Samples, view_samples

#: Above this share of the loss on prompts a page says so first.
_MUCH_ON_PROMPTS = 0.01


@dataclass(frozen=True)
class Remark:
    """Something worth knowing before training.

    Attributes:
        level: "good", "info", "warn" or "bad".
        text: one sentence.
    """

    level: str
    text: str

    @property
    def word(self) -> str:
        """The level in a word."""
        return {"good": "good", "warn": "look", "bad": "bad"}.get(self.level, "note")


@dataclass(frozen=True)
class Preview:
    """All that a preview tells.

    Attributes:
        run_file: that was opened.
        facts: names and values.
        remarks: what is worth knowing, the worst first.
        samples: that are shown.
        held_out: they are those of evaluation.
        lengths: of the training data.
        modes: what micro-batches cost in each mode.
        world_size: ranks that they were measured on.
        own_mode: of the run.
        intro: which samples are shown.
        lengths_intro: what the lengths are.
        batching_intro: what was measured.
    """

    run_file: Path
    facts: Sequence[tuple[str, str]]
    remarks: Sequence[Remark]
    samples: Samples
    held_out: bool
    lengths: Lengths
    modes: Sequence[ModeFigures]
    world_size: int
    own_mode: str
    intro: str
    lengths_intro: str
    batching_intro: str


def make_preview(
    run_file: Path,
    overrides: Sequence[str] = (),
    *,
    count: int = 12,
    step: int | None = None,
    seed: int | None = None,
    held_out: bool = False,
    world_size: int = 1,
    num_workers: int = 1,
) -> Preview:
    """Open a run and look at it.

    Args:
        run_file: of the run.
        overrides: as `--set` takes them.
        count: samples to show.
        step: the first step that is looked at; None: 0.
        seed: samples are drawn by it from all steps; None: those of the first steps.
        held_out: show samples of `data.eval`.
        world_size: ranks of the run.
        num_workers: processes that decode; 0: this one, which a decoder may end.

    Raises:
        ConfigError: the configuration does not fit itself or the data.
        DataError: data cannot be read.
        ModelError: the processor cannot be loaded.
    """
    run = open_run(run_file, overrides, world_size)
    chosen = choose_samples(run, count, step=step, seed=seed, held_out=held_out)
    samples = view_samples(run, chosen, num_workers)
    lengths = measure_lengths(run, source_repeats(run.config, run.train_sources))
    modes = measure_modes(run)
    return Preview(
        run_file=run_file,
        facts=list(_facts(run, lengths, samples)),
        remarks=list(_remarks(run, samples, lengths, step or 0)),
        samples=samples,
        held_out=held_out,
        lengths=lengths,
        modes=modes,
        world_size=world_size,
        own_mode=run.plan.settings.mode,
        intro=_intro(run, samples, step, seed, held_out),
        lengths_intro=_lengths_intro(lengths),
        batching_intro=_batching_intro(run, lengths),
    )


def _intro(run: OpenRun, samples: Samples, step: int | None, seed: int | None, held_out: bool) -> str:
    if held_out:
        which = "the first held-out samples" if seed is None else f"held-out samples drawn by seed {seed}"
    elif seed is not None:
        which = f"samples drawn by seed {seed} from " + ("all steps" if step is None else f"step {step}")
    else:
        which = f"the samples of step {step or 0}, and of those after it where it has too few"
    told = (
        f"{len(samples.views)} samples from {samples.num_batches} micro-batches, made by the trainer's own code: "
        f"{which}; of every source at least one, where there is room."
    )
    if run.plan.settings.by_length and seed is None and not held_out:
        told += " train.group_by_length puts samples of similar length into one step; --seed 0 shows some of all steps."
    return told


def _lengths_intro(lengths: Lengths) -> str:
    told = f"Tokens of the {lengths.num_samples:,} training samples, {lengths.kind}"
    if lengths.is_sampled:
        told = f"Tokens of {lengths.num_seen:,} of the {lengths.num_samples:,} training samples, spread evenly over "
        told += f"shards, {lengths.kind}"
    if not lengths.are_exact:
        told += " from sizes of texts and pictures (vlm-dist shards tokens RUN.yaml counts them)"
    return told + ", after what max_length does to them."


def _batching_intro(run: OpenRun, lengths: Lengths) -> str:
    ranks = "1 rank, which waits for nobody" if run.batch.world_size == 1 else f"{run.batch.world_size} ranks"
    total = run.plan.steps_per_epoch
    steps = f"the first {BATCHING_STEPS} of {total:,} steps" if total > BATCHING_STEPS else "all steps"
    return (
        f"What {steps} of an epoch would cost in each mode, by the planner's own measure, from {lengths.kind} lengths, "
        f"on {ranks}; {run.batch}."
    )


def _facts(run: OpenRun, lengths: Lengths, samples: Samples) -> Iterator[tuple[str, str]]:
    yield "model", run.config.model_id.rstrip("/").rpartition("/")[2] or run.config.model_id
    yield "family", run.family.name
    yield "training samples", f"{lengths.num_samples:,}"
    yield "samples of an epoch", f"{run.plan.num_epoch_samples:,}"
    yield "steps", f"{run.plan.num_steps:,}"
    yield "global batch", f"{run.batch.global_batch_size:,}"
    yield "micro-batches", run.plan.settings.mode.replace("_", " ")
    yield "max_length", f"{lengths.max_length:,}"
    yield "loss on answers", f"{1 - samples.prompt_share:.0%}" if samples.num_targets else "none"


def _remarks(run: OpenRun, samples: Samples, lengths: Lengths, step: int) -> Iterator[Remark]:
    empty = Counter(view.error_class for view in samples.views if view.error is not None)
    if empty:
        listed = ", ".join(f"{count} {name}" for name, count in empty.items())
        yield Remark("bad", f"{sum(empty.values())} of {len(samples.views)} samples cannot be used ({listed})")
    masking = run.config.collator.label_masking
    if samples.prompt_share > _MUCH_ON_PROMPTS:
        text = f"{samples.prompt_share:.0%} of the loss is on tokens of prompts, not of answers"
        yield Remark(
            "warn", text + ("" if masking.mask_input_tokens else " (label_masking.mask_input_tokens is false)")
        )
    elif samples.num_targets:
        yield Remark("good", f"{1 - samples.prompt_share:.0%} of the loss is on answers")
    if any(view.pads_have_loss for view in samples.views):
        yield Remark("warn", "padding carries loss, too (label_masking.mask_pad_token is false)")
    at_limit = sum(source.num_at_limit for source in lengths.sources)
    if lengths.outcomes is not None:
        listed = ", ".join(f"{count:,} {name}" for name, count in lengths.outcomes.items() if count)
        if listed:
            yield Remark("warn", f"max_length {lengths.max_length:,}, of {lengths.num_samples:,} samples: {listed}")
    elif at_limit:
        share = at_limit / max(lengths.num_seen, 1)
        yield Remark(
            "warn" if share > _MUCH_ON_PROMPTS else "info",
            f"{at_limit:,} of {lengths.num_seen:,} samples would be longer than max_length {lengths.max_length:,}: "
            "media are made smaller for it, or texts cut",
        )
    for line in (*run.config.notices, *describe_plan(run.config, run.plan, run.batch, step)):
        yield Remark("info", line.removeprefix("notice: "))
