"""The stage of the processor: it loads, and samples become tokens, labels and tensors, one by one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vlm_dist.check.parts import Parts
from vlm_dist.config import RunConfig
from vlm_dist.data.encoding.inside import SampleInside
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.types import MicroBatchJob, NullSlot, SampleRef
from vlm_dist.data.workers.pool import WorkerPool
from vlm_dist.errors import ExitCode
from vlm_dist.observability.findings import Finding, Level

#: Samples of each source.
NUM_SAMPLES = 4


def check_processor(parts: Parts) -> Iterator[Finding]:
    """Load it; then encode a few samples of every source with it, each by itself."""
    processor, family = parts.processor()
    tokenizer = getattr(processor, "tokenizer", processor)
    yield Finding(
        Level.OK,
        "processor",
        f"{type(processor).__name__} of the family {family.name}; {len(tokenizer):,} tokens in its vocabulary",
    )
    config = parts.config("model", "collator", "data", "train")
    materialise = parts.training_materialiser()
    seen: list[SampleInside] = []
    bad: list[NullSlot] = []
    targets = prompt_targets = 0
    for number, source in enumerate(parts.sources("train")):
        if not len(source):
            continue
        rows = np.unique(np.linspace(0, len(source) - 1, min(NUM_SAMPLES, len(source))).astype(int)).tolist()
        jobs = [MicroBatchJob(0, 0, (SampleRef(number, row),)) for row in rows]
        for inside, num_targets, num_prompt in _encoded(materialise, jobs, config):
            if isinstance(inside, NullSlot):
                bad.append(inside)
                continue
            seen.append(inside)
            targets += num_targets
            prompt_targets += num_prompt
    max_length = config.collator.text_processing.max_length
    if seen:
        lengths = [len(inside.answers) for inside in seen]
        visual = sum(int(inside.is_visual.sum()) for inside in seen)
        yield Finding(
            Level.OK,
            "tokens",
            f"{min(lengths):,} to {max(lengths):,} of max_length {max_length:,} in {len(seen)} samples, "
            f"{visual / sum(lengths):.0%} of them visual",
        )
        yield from _about_fit(seen, max_length)
    for slot in bad[:NUM_SAMPLES]:
        yield Finding(
            Level.PROBLEM if not seen else Level.WARNING,
            "sample",
            f"{slot.origin}: {slot.null_class}: {slot.message}",
            "" if seen else "none of the samples that were looked at can be used",
            exit_code=ExitCode.DATA,
        )
    if targets:
        yield from _about_loss(prompt_targets / targets, config.collator.label_masking.mask_input_tokens)
    elif seen:
        yield Finding(
            Level.PROBLEM,
            "loss",
            "no token of these samples carries loss",
            "look at label_masking, and at the answers: `vlm-dist preview` shows them",
            exit_code=ExitCode.DATA,
        )


def _encoded(
    materialise: Materialiser, jobs: list[MicroBatchJob], config: RunConfig
) -> Iterator[tuple[SampleInside | NullSlot, int, int]]:
    """Each job's sample, its tokens with loss, and those of them that are not the assistant's."""
    ignored = config.collator.label_masking.ignore_index
    with WorkerPool(materialise, 1, sample_timeout_seconds=config.data.sample_timeout_seconds) as pool:
        pending = [pool.submit(job) for job in jobs]
        for job, made in zip(jobs, pending, strict=True):
            batch = made.result()
            if batch.null_slots:  # a worker has met it: what crashes a decoder is not touched here
                yield batch.null_slots[0], 0, 0
                continue
            batch, (inside,) = materialise.look_inside(job)
            if isinstance(inside, NullSlot):
                yield inside, 0, 0
                continue
            own = batch.labels[inside.row, inside.start : inside.start + len(inside.answers)] != ignored
            yield inside, int(own.sum()), int((own & ~inside.answers).sum())


def _about_fit(seen: list[SampleInside], max_length: int) -> Iterator[Finding]:
    reduced, cut = sum(one.was_reduced for one in seen), sum(one.was_cut for one in seen)
    if reduced or cut:
        yield Finding(
            Level.WARNING,
            "max_length",
            f"of {len(seen)} samples, {reduced} had their media made smaller and {cut} their text cut to fit "
            f"max_length {max_length:,}",
            "raise collator.text_processing.max_length, or make media smaller on purpose (max_size, max_pixels, "
            "num_frames)",
        )


def _about_loss(prompt_share: float, masks_prompt: bool) -> Iterator[Finding]:
    found = f"{prompt_share:.0%} of it on tokens of the prompt, {1 - prompt_share:.0%} on answers"
    if prompt_share > 0.5 and not masks_prompt:
        yield Finding(
            Level.WARNING,
            "loss",
            found,
            "set collator.label_masking.mask_input_tokens: true to learn the answers alone",
        )
    else:
        yield Finding(Level.OK, "loss", found)
