"""The stage of the model: its files, what is trained of it, DeepSpeed's JSON, room for checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_dist.build.data import make_cadence
from vlm_dist.build.meta_model import meta_model
from vlm_dist.build.parts import merge_for
from vlm_dist.build.saving import make_retention
from vlm_dist.check.parts import NotThereError, OfStageError, Parts
from vlm_dist.config import RunConfig
from vlm_dist.errors import ExitCode, ModelError
from vlm_dist.model import (
    check_compilation,
    check_quantization,
    describe_trained,
    format_tower_table,
    tower_table,
)
from vlm_dist.model.loading_errors import check_present, is_local
from vlm_dist.observability.findings import Finding, Level, size_text

#: Of a checkpoint, a trained element: adapter, fp32 master and two moments (docs/benchmarks/checkpoint.md).
CHECKPOINT_BYTES = 16
#: DeepSpeed's own and ours are few beside it.
_WEIGHT_FILES = ("*.safetensors", "*.bin")


def check_model(parts: Parts) -> Iterator[Finding]:
    """Make the model without its weights, place the adapter, and count."""
    config = parts.config("model", "peft", "train")
    yield from _files(config)
    ds_json = parts.deepspeed()
    stage = ds_json["zero_optimization"]["stage"]
    check_quantization(config.peft.quantization, stage)
    check_compilation(config.train.torch_compile, stage)
    model = meta_model(config)
    towers, rates = config.peft.towers.model_dump(), config.peft.towers_learning_rate.model_dump()
    table = tower_table(model, towers, config.train.learning_rate, rates)
    whole = table[-1]
    yield Finding(
        Level.OK,
        "model",
        f"{config.model_id}: {whole.num_parameters:,} parameters, {whole.num_trainable:,} trained "
        f"({whole.num_trainable / max(whole.num_parameters, 1):.2%}), in {whole.num_lora_modules:,} layers with LoRA",
        details=f"{format_tower_table(table)}\n\n{describe_trained(model)}".rstrip(),
    )
    if not whole.num_trainable:
        yield Finding(
            Level.PROBLEM,
            "model",
            "nothing is trained",
            "peft.towers: lora or full somewhere",
            exit_code=ExitCode.MODEL,
        )
    yield from _deepspeed(parts, config, ds_json, whole.num_trainable)
    yield from _room(parts, config, whole.num_trainable)


def _files(config: RunConfig) -> Iterator[Finding]:
    """What lies on the disk of a model; nothing is fetched but its config.json."""
    revision = config.model.loading_for(config.model_id).revision
    if not is_local(config.model_id):
        check_present(config.model_id, revision, weights=False, processor=False)
        yield Finding(Level.OK, "weights", f"of {config.model_id} on the hub: fetched when training starts, not here")
        return
    try:
        check_present(config.model_id, revision, weights=True, processor=False)
    except ModelError as error:
        yield Finding(Level.PROBLEM, "weights", str(error), exit_code=error.exit_code)
        return
    directory = Path(config.model_id)
    size = sum(file.stat().st_size for pattern in _WEIGHT_FILES for file in directory.glob(pattern))
    found = f"{size_text(size)} in {directory}; their names and shapes are read by --stage step"
    yield Finding(Level.OK, "weights", found)


def _deepspeed(parts: Parts, config: RunConfig, ds_json: dict[str, Any], num_trainable: int) -> Iterator[Finding]:
    """Merge the JSON with what the run says; tell what was derived."""
    _, derived = merge_for(config, ds_json, parts.world_size, 1, num_trainable)
    yield Finding(
        Level.OK,
        "deepspeed",
        f"{config.deepspeed}: ZeRO stage {ds_json['zero_optimization']['stage']}",
        details="\n".join(f"derived: {value}" for value in derived),
    )


def _room(parts: Parts, config: RunConfig, num_trainable: int) -> Iterator[Finding]:
    """Whether the checkpoints that are kept, and the one that is being written, fit on the disk."""
    size = CHECKPOINT_BYTES * num_trainable
    train = config.train
    try:
        num_steps = parts.plan().num_steps
    except (NotThereError, OfStageError):
        num_steps = train.max_steps if train.max_steps > 0 else 0
    if not num_steps:
        yield Finding(Level.OK, "checkpoints", f"{size_text(size)} each")
        return
    saves = make_cadence(config, num_steps).save_steps
    positions = sorted({*range(saves, num_steps + 1, saves), num_steps} if saves else {num_steps})
    retention = make_retention(config, num_steps)
    doomed = {*retention.doomed(positions, best=None)}
    count = len(positions) - len(doomed) + (train.metric_for_best_model is not None) + 1
    needed = count * size
    directory = _existing(train.output_dir.absolute())
    free = shutil.disk_usage(directory).free
    found = (
        f"{_counted(len(positions))} written, up to {count:,} lie in {train.output_dir} at a time: {count} x "
        f"{size_text(size)} = {size_text(needed)}, {size_text(free)} are free"
    )
    if needed > free:
        yield Finding(
            Level.PROBLEM,
            "checkpoints",
            found,
            "another train.output_dir, a lower save_total_limit or save_keep_steps, or a lower peft.r",
            exit_code=ExitCode.CHECKPOINT,
        )
    else:
        yield Finding(Level.OK, "checkpoints", found)


def _counted(number: int) -> str:
    return f"{number:,} {'is' if number == 1 else 'are'}"


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())
