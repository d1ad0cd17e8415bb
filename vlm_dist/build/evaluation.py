"""Evaluation in training, from the configuration: what measures, and what ends a run that gets no better."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_dist.checkpoint import Checkpoint
from vlm_dist.config import RunConfig
from vlm_dist.config.answer_metrics import is_greater_better
from vlm_dist.data.purposes import PurposePool
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.types import Source
from vlm_dist.data.workers.pool import WorkerPool
from vlm_dist.distributed.failures import agree_on_failure
from vlm_dist.distributed.group import Ranks
from vlm_dist.engine import Engine
from vlm_dist.evaluate import EarlyStopping, Evaluator
from vlm_dist.observability.jsonl import METRICS_FILE, read_metrics


def make_evaluator(
    config: RunConfig,
    ranks: Ranks,
    engine: Engine,
    sources: Sequence[Source],
    pool: WorkerPool,
    processor: Any,
    quarantine: Quarantine,
) -> Evaluator | None:
    """The held-out sources' evaluator; None where there are no such sources."""
    if not sources:
        return None
    train_config = config.train
    return Evaluator(
        engine=engine,
        ranks=ranks,
        sources=sources,
        pool=PurposePool(pool, "eval"),
        per_device_eval_batch_size=train_config.per_device_eval_batch_size,
        generation_pool=PurposePool(pool, "generate") if train_config.predict_with_generate else None,
        tokenizer=getattr(processor, "tokenizer", processor),
        max_new_tokens=train_config.generation_max_new_tokens,
        metrics=train_config.eval_metrics,
        predictions_dir=train_config.output_dir / "predictions",
        ignore_index=config.collator.label_masking.ignore_index,
        quarantine=quarantine,
    )


def make_patience(config: RunConfig, ranks: Ranks, checkpoint: Checkpoint | None) -> EarlyStopping | None:
    """Early stopping, where it is asked for, as it was at the checkpoint. Collective: every rank calls this.

    It is not in the checkpoint: an evaluation may come after the save of its step. It hears the evaluations that are on
    record instead, up to the checkpoint's step.
    """
    settings = config.train
    if settings.early_stopping_patience is None or settings.metric_for_best_model is None:
        return None
    metric, greater = settings.metric_for_best_model, settings.greater_is_better
    stopping = EarlyStopping(
        metric,
        is_greater_better(metric) if greater is None else greater,
        settings.early_stopping_patience,
        settings.early_stopping_threshold,
    )
    heard: list[dict[str, Any]] = []
    with agree_on_failure(ranks):
        if ranks.is_main and checkpoint is not None:
            heard = evaluations_until(checkpoint.path.parent / METRICS_FILE, checkpoint.step)
    for figures in ranks.broadcast_object(heard):
        stopping.hear(figures["step"], figures)
    return stopping


def evaluations_until(path: Path, position: int) -> list[dict[str, Any]]:
    """Evaluations on record up to a position; none where there is no record."""
    try:
        return [record for record in read_metrics(path, "eval") if record.get("step", position + 1) <= position]
    except FileNotFoundError:
        return []
