"""What saves the checkpoints of a run, from its configuration."""

from __future__ import annotations

from collections.abc import Callable

from vlm_dist.checkpoint import CheckpointSaver, CheckpointStore, Places, Retention, RunFacts
from vlm_dist.config import RunConfig
from vlm_dist.config.arithmetic import resolve_interval
from vlm_dist.distributed.group import Ranks
from vlm_dist.engine import Engine
from vlm_dist.observability.log import MetricLog


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
    return CheckpointSaver(store, engine, ranks, places, facts, log)
