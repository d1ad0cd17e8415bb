"""Single parts of a run, from the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vlm_dist.config import RunConfig
from vlm_dist.data.types import MicroBatch, MicroBatchJob
from vlm_dist.data.workers.pool import WorkerPool
from vlm_dist.distributed.group import Ranks
from vlm_dist.engine import Engine, merge_deepspeed_config
from vlm_dist.model import tower_rates
from vlm_dist.optim import make_lr_schedule, make_optimizer, parameter_groups


def ds_merger(
    config: RunConfig, ds_json: dict[str, Any], ranks: Ranks
) -> Callable[[int | None], tuple[dict[str, Any], list[Any]]]:
    """Merge DeepSpeed's config; the number of trainable parameters is known only when the model is loaded."""
    num_nodes = max(1, ranks.world_size // ranks.topology.local_world_size)
    return lambda num_trainable: merge_for(config, ds_json, ranks.world_size, num_nodes, num_trainable)


def merge_for(
    config: RunConfig, ds_json: dict[str, Any], world_size: int, num_nodes: int, num_trainable: int | None
) -> tuple[dict[str, Any], list[Any]]:
    """DeepSpeed's config for so many ranks, and what was derived."""
    return merge_deepspeed_config(
        ds_json,
        per_device_train_batch_size=config.train.per_device_train_batch_size,
        bf16=config.train.bf16,
        fp16=config.train.fp16,
        max_grad_norm=config.train.max_grad_norm,
        world_size=world_size,
        num_nodes=num_nodes,
        num_trainable=num_trainable,
    )


def make_engine(
    config: RunConfig,
    model: nn.Module,
    ds_config: Mapping[str, Any],
    num_steps: int,
    ranks: Ranks,
    report: Callable[[str], None],
) -> Engine:
    """The model under ZeRO with its optimizer and schedule. Collective: every rank calls this.

    Args:
        config: of the run.
        model: with its adapter.
        ds_config: merged, with the number of trainable parameters.
        num_steps: of the whole run, by which the schedule goes.
        ranks: of the run.
        report: where messages go.
    """
    return Engine.initialise(
        model,
        lambda groups: make_optimizer(config.train, groups),
        parameter_groups(
            model, config.train.weight_decay, tower_rates(model, config.peft.towers_learning_rate.model_dump())
        ),
        make_lr_schedule(config.train, num_steps),
        ds_config,
        control_group=ranks.control,
        report=report,
    )


def make_pool(config: RunConfig, materialise: Callable[[MicroBatchJob], MicroBatch], has_gpu: bool) -> WorkerPool:
    """The data workers of this rank."""
    gib = config.data.worker_memory_gib
    return WorkerPool(
        materialise,
        config.train.dataloader_num_workers,
        sample_timeout_seconds=config.data.sample_timeout_seconds,
        max_memory_bytes=None if gib is None else int(gib * 2**30),
        pin_memory=config.train.dataloader_pin_memory and has_gpu,
    )
