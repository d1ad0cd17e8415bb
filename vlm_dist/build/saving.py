"""What saves the checkpoints of a run, from its configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from vlm_dist.build.metering import keep_each_adapter
from vlm_dist.checkpoint import (
    CheckpointSaver,
    CheckpointStore,
    Places,
    Retention,
    RunFacts,
    SlicedCheckpointSaver,
    save_adapter,
    save_best_adapter,
)
from vlm_dist.config import RunConfig
from vlm_dist.config.answer_metrics import EVAL_PREFIX, OVERALL
from vlm_dist.config.arithmetic import resolve_interval
from vlm_dist.config.explain import nearest
from vlm_dist.data.types import Source
from vlm_dist.distributed.failures import agree_on_failure
from vlm_dist.distributed.group import Ranks
from vlm_dist.engine import Engine
from vlm_dist.errors import ConfigError
from vlm_dist.evaluate import distinct_names
from vlm_dist.observability.log import MetricLog

#: Of master and moments, a trainable element.
STATE_BYTES = 12
#: From so much on rank 0 would be the one that everything waits for, and whose memory decides: some 0.7 B parameters.
SLICED_FROM_BYTES = 8 * 10**9


def check_best_metric(config: RunConfig, eval_sources: Sequence[Source]) -> None:
    """Refuse a metric of a source that there is not: no checkpoint would ever be the best.

    Raises:
        ConfigError: there is no such source; names those that there are.
    """
    metric = config.train.metric_for_best_model
    if metric is None or "/" not in metric:
        return
    names = [*distinct_names(eval_sources), *([OVERALL] if len(eval_sources) > 1 else [])]
    wanted = metric.rpartition("/")[0]
    if wanted in names or wanted.removeprefix(EVAL_PREFIX) in names:
        return
    close = nearest(wanted, names)
    raise ConfigError(
        f"train.metric_for_best_model: got {metric}, but data.eval has no source {wanted!r}, only {', '.join(names)}"
        + (f"; did you mean {close}?" if close is not None else "")
    )


def store_report(ranks: Ranks, log: MetricLog) -> Callable[[str], None]:
    """Where this rank's store tells what it sets aside or cannot delete: the log is rank 0's, the disk this node's."""
    return log.message if ranks.is_main else logging.getLogger(__name__).warning


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
    resumed_at: int = -1,
) -> CheckpointSaver:
    """The saver of a run of so many steps. Collective: every rank calls this."""
    store = CheckpointStore(config.train.output_dir, make_retention(config, num_steps), report=store_report(ranks, log))
    if places.are_copies and ranks.is_main:
        nodes = ", ".join(places.hosts)
        log.message(
            f"{config.train.output_dir} is not shared by all nodes: the first rank of each of these writes a copy of "
            f"every checkpoint: {nodes}"
        )
    with agree_on_failure(ranks):
        if places.is_writer:
            store.claim()
    written = keep_each_adapter(config, log)
    if is_sliced(config, engine, ranks, places):
        log.message("every rank writes its own share of a checkpoint")
        return SlicedCheckpointSaver(store, engine, ranks, places, facts, log, resumed_at, written)
    return CheckpointSaver(store, engine, ranks, places, facts, log, resumed_at, written)


def publish_adapter(
    config: RunConfig, store: CheckpointStore, engine: Engine, ranks: Ranks, report: Callable[[str], None]
) -> Path:
    """Write output_dir/adapter at the end of a run. Collective: every rank calls this.

    Args:
        config: of the run.
        store: of the run.
        engine: after the last step; all checkpoints are written.
        ranks: of the run.
        report: is told which adapter it is, where that is not plain.

    Returns:
        Its directory.

    Raises:
        CheckpointError: on every rank: it could not be written.
    """
    settings = config.train
    metric = settings.metric_for_best_model
    if settings.load_best_model_at_end and metric is not None:
        published = save_best_adapter(store, metric, ranks)
        if published is not None:
            report(f"load_best_model_at_end: the adapter is that of step {published[1]}, the best by {metric}")
            return published[0]
        report(
            f"warning: load_best_model_at_end: no checkpoint can be used as the best by {metric} (best are those of "
            "steps that are saved and evaluated); the adapter is that of the last step"
        )
    return save_adapter(store, engine, ranks)


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
