"""What saves the checkpoints of a run, from its configuration."""

from __future__ import annotations

from collections.abc import Callable

from vlm_dist.checkpoint import (
    CheckpointSaver,
    CheckpointStore,
    Places,
    Retention,
    RunFacts,
    SlicedCheckpointSaver,
)
from vlm_dist.config import RunConfig
from vlm_dist.config.arithmetic import resolve_interval
from vlm_dist.distributed.group import Ranks
from vlm_dist.engine import Engine
from vlm_dist.errors import ConfigError
from vlm_dist.observability.log import MetricLog

#: Of master and moments, a trainable element.
STATE_BYTES = 12
#: From so much on rank 0 would be the one that everything waits for, and whose memory decides: some 0.7 B parameters.
SLICED_FROM_BYTES = 8 * 10**9


def make_retention(config: RunConfig, num_steps: int) -> Retention:
    """Which checkpoints stay, with intervals in steps."""
    settings = config.train
    return Retention(
        total_limit=settings.save_total_limit,
        keep_steps=resolve_interval(settings.save_keep_steps, num_steps),
        metric=settings.metric_for_best_model,
        greater_is_better=settings.greater_is_better,
    )


def make_saver(
    config: RunConfig,
    ranks: Ranks,
    engine: Engine,
    places: Places,
    num_steps: int,
    facts: Callable[[int], RunFacts],
    log: MetricLog,
) -> CheckpointSaver:
    """The saver of a run of so many steps."""
    store = CheckpointStore(config.train.output_dir, make_retention(config, num_steps), report=log.message)
    if places.are_copies and ranks.is_main:
        nodes = ", ".join(places.hosts)
        log.message(
            f"{config.train.output_dir} is not shared by all nodes: the first rank of each of these writes a copy of "
            f"every checkpoint: {nodes}"
        )
    if is_sliced(config, engine, ranks, places):
        log.message("every rank writes its own share of a checkpoint")
        return SlicedCheckpointSaver(store, engine, ranks, places, facts, log)
    return CheckpointSaver(store, engine, ranks, places, facts, log)


def is_sliced(config: RunConfig, engine: Engine, ranks: Ranks, places: Places) -> bool:
    """Whether each rank writes a file of its own; the same on all ranks.

    Raises:
        ConfigError: it is asked for where it cannot be.
    """
    asked = config.train.save_in_slices
    if asked is True and places.are_copies:
        raise ConfigError(
            f"train.save_in_slices: true needs an output_dir that all nodes see; {config.train.output_dir} is a "
            f"directory of its own on {', '.join(places.hosts)}"
        )
    if asked != "auto":
        return asked
    is_large = engine.num_trainable * STATE_BYTES >= SLICED_FROM_BYTES
    return is_large and ranks.world_size > 1 and engine.zero_stage > 0 and not places.are_copies
