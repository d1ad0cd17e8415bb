"""The stage of the batch: the sizes of steps, the plan, and one whole micro-batch as the model will get it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from vlm_dist.build.continuation import check_output_dir
from vlm_dist.build.data import describe_plan, make_cadence
from vlm_dist.build.saving import check_best_metric
from vlm_dist.check.parts import Parts
from vlm_dist.checkpoint import CheckpointStore
from vlm_dist.config import RunConfig
from vlm_dist.data.plan.measure import measure
from vlm_dist.data.plan.plan import Plan
from vlm_dist.data.types import MicroBatch
from vlm_dist.data.workers.pool import WorkerPool
from vlm_dist.errors import CheckpointError, ConfigError, ExitCode
from vlm_dist.observability.findings import Finding, Level

_NOTICE = "notice: "
#: Steps of which padding and balance are told.
_MEASURED_STEPS = 16


def check_batch(parts: Parts) -> Iterator[Finding]:
    """Do the arithmetic, make the plan, and make the first micro-batch of the first step."""
    batch = parts.batch()
    yield Finding(Level.OK, "batch", str(batch))
    if batch.idle_share:
        yield Finding(
            Level.WARNING,
            "batch",
            f"{batch.idle_share:.0%} of the ranks' micro-batches are empty: {batch.world_size} ranks do not divide "
            f"{batch.num_micro_batches} micro-batches",
            "another number of ranks, or another per_device_train_batch_size",
        )
    config = parts.config("model", "collator", "data", "train")
    try:
        check_output_dir(config, CheckpointStore(config.train.output_dir))
    except CheckpointError as error:  # no problem of the data or the settings: whoever looks again has trained before
        yield Finding(Level.WARNING, "output_dir", f"training will not start: {error}")
    plan = parts.plan()
    cadence = make_cadence(config, plan.num_steps)
    every = {"log": cadence.logging_steps, "evaluate": cadence.eval_steps, "save": cadence.save_steps}
    rhythm = ", ".join(f"{doing} every {steps:,}" if steps else f"never {doing}" for doing, steps in every.items())
    yield Finding(
        Level.OK,
        "steps",
        f"{plan.num_epoch_samples:,} samples an epoch, {plan.steps_per_epoch:,} steps an epoch, {plan.num_steps:,} "
        f"steps in all; {rhythm}",
    )
    for line in describe_plan(config, plan, batch):
        is_odd = line.startswith(_NOTICE)
        yield Finding(Level.WARNING if is_odd else Level.OK, "plan", line.removeprefix(_NOTICE))
    yield _padding(plan, batch.world_size)
    try:
        check_best_metric(config, parts.sources("eval"))
    except ConfigError as error:
        yield Finding(Level.PROBLEM, "best", str(error), exit_code=ExitCode.CONFIG)
    yield from _first_micro_batch(parts, config, plan)


def _padding(plan: Plan, world_size: int) -> Finding:
    steps = (plan.step(index) for index in range(min(_MEASURED_STEPS, plan.num_steps)))
    figures = measure(plan, steps, world_size)
    mode = {"padding": "no grouping", "group_by_length": "group_by_length", "packing": "packing"}[plan.settings.mode]
    found = f"{mode}: {figures.padding_share:.1%} of the computed tokens are padding"
    if world_size > 1:
        found += f", ranks wait for each other {figures.idle_share:.1%} of the time (as predicted)"
    if figures.padding_share > 0.3:
        return Finding(
            Level.WARNING,
            "padding",
            found,
            "train.packing: true, or group_by_length: true; `vlm-dist preview` compares the modes",
        )
    return Finding(Level.OK, "padding", found)


def _first_micro_batch(parts: Parts, config: RunConfig, plan: Plan) -> Iterator[Finding]:
    (job, *_) = plan.step(0).for_rank(0, parts.world_size)
    with WorkerPool(
        parts.training_materialiser(), 1, sample_timeout_seconds=config.data.sample_timeout_seconds
    ) as pool:
        made: MicroBatch = pool.submit(job).result()
    lost = [slot for slot in made.null_slots if slot.origin is not None]
    for slot in lost:
        yield Finding(
            Level.WARNING,
            "micro-batch",
            f"{slot.origin}: {slot.null_class}: {slot.message}",
            "it is left out; quarantine/ names such samples in training",
            exit_code=ExitCode.DATA,
        )
    if not made.num_target_tokens:
        yield Finding(
            Level.PROBLEM,
            "micro-batch",
            "no token of the first one carries loss",
            "`vlm-dist preview` shows what its samples have become",
            exit_code=ExitCode.DATA,
        )
        return
    share = made.num_target_tokens / made.num_computed_tokens
    yield Finding(
        Level.OK,
        "micro-batch",
        f"{made.num_samples} samples, {made.num_tokens:,} tokens, {made.num_target_tokens:,} with loss ({share:.0%} of "
        "what is computed)",
        details=tensor_table(made),
    )


def tensor_table(made: MicroBatch) -> str:
    """Names, shapes and types of what the model gets, and the range of their values."""
    rows = [("tensor", "shape", "dtype", "values")]
    for name, tensor in {**made.inputs, "labels": made.labels}.items():
        if isinstance(tensor, Tensor):
            rows.append((name, str(list(tensor.shape)), str(tensor.dtype).removeprefix("torch."), _range(tensor)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    )


def _range(tensor: Tensor) -> str:
    if not tensor.numel():
        return "empty"
    low, high = tensor.min().item(), tensor.max().item()
    return f"{low:.3g} to {high:.3g}" if tensor.is_floating_point() else f"{low} to {high}"
