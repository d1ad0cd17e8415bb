"""What measures a run and sends its figures away, from its configuration."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from vlm_dist.build.thumbnails import Thumbnails
from vlm_dist.checkpoint.layout import ADAPTER_FILES, checkpoint_name
from vlm_dist.checkpoint.retention import read_best
from vlm_dist.config import RunConfig
from vlm_dist.data.types import Source
from vlm_dist.distributed.group import Ranks
from vlm_dist.engine import Engine
from vlm_dist.evaluate import distinct_names
from vlm_dist.families import Family
from vlm_dist.meter import Meter
from vlm_dist.model import tower_table
from vlm_dist.model.devices import peak_flops
from vlm_dist.model.flops import FlopModel
from vlm_dist.observability.log import MetricLog
from vlm_dist.observability.profile import StepProfile
from vlm_dist.observability.wandb_sink import WandbNames
from vlm_dist.trainer_parts import Cadence, Profiles, unprofiled

logger = logging.getLogger(__name__)


def make_log(config: RunConfig, ranks: Ranks) -> MetricLog:
    """Where figures and messages of a run go.

    Raises:
        ConfigError: the package of a service is missing.
    """
    settings = config.train
    return MetricLog(
        settings.output_dir,
        rank=ranks.rank,
        report_to=settings.report_to,
        run_name=settings.run_name or settings.output_dir.resolve().name,
        config=config.dump(),
        wandb=WandbNames(
            project=settings.wandb_project,
            entity=settings.wandb_entity,
            group=settings.wandb_group,
            tags=settings.wandb_tags,
            notes=settings.wandb_notes,
        ),
    )


def show_pictures(config: RunConfig, ranks: Ranks, log: MetricLog, sources: Sequence[Source], family: Family) -> None:
    """Have answers shown with their samples' pictures where somebody shows both."""
    if ranks.is_main and config.train.predict_with_generate and "wandb" in config.train.report_to:
        log.show_pictures(Thumbnails(config, sources, family))


def make_meter(
    config: RunConfig,
    ranks: Ranks,
    cadence: Cadence,
    log: MetricLog,
    model: nn.Module,
    engine: Engine,
    sources: Sequence[Source],
    start: int,
) -> Meter:
    """What measures the steps.

    Args:
        config: of the run.
        ranks: of the run.
        cadence: of the run.
        log: where lines go.
        model: with its adapter.
        engine: around it.
        sources: of the training data.
        start: steps that are done already.
    """
    return Meter(
        ranks,
        cadence,
        log,
        engine.device,
        start=start,
        sources=distinct_names(sources),
        flops=_flop_model(config, model),
        peak_flops=device_peak_flops(config, engine.device),
        tower_factors=tower_factors(config, model, engine.base_learning_rate),
        timer=engine.forward_timer,
    )


def device_peak_flops(config: RunConfig, device: torch.device) -> float | None:
    """Operations per second that this rank's device can do; None where nobody knows."""
    if config.train.device_peak_tflops is not None:
        return config.train.device_peak_tflops * 1e12
    if device.type != "cuda" or config.train.precision == "float32":  # the table is of 16 bits
        return None
    return peak_flops(torch.cuda.get_device_name(device))


def tower_factors(config: RunConfig, model: nn.Module, base_rate: float) -> dict[str, float]:
    """Tower -> its learning rate as a multiple of the first group's; empty where all towers have the same."""
    towers, rates = config.peft.towers.model_dump(), config.peft.towers_learning_rate.model_dump()
    table = tower_table(model, towers, config.train.learning_rate, rates)
    own = {row.tower: row.learning_rate for row in table if row.learning_rate is not None}
    if len(set(own.values())) < 2:
        return {}
    return {tower: rate / base_rate for tower, rate in own.items()}


def _flop_model(config: RunConfig, model: nn.Module) -> FlopModel | None:
    try:
        return FlopModel.of(model, config.collator.label_masking.ignore_index)
    except Exception as error:  # noqa: BLE001 - a figure must not end a run
        logger.warning("operations cannot be counted, so that MFU is left out: %s: %s", type(error).__name__, error)
        return None


def make_profile(config: RunConfig, ranks: Ranks, log: MetricLog, meter: Meter) -> AbstractContextManager[Profiles]:
    """What looks at steps as they run; entered around the loop."""
    settings = config.train.profile
    if settings is None:
        return contextlib.nullcontext(unprofiled)
    absent = [rank for rank in settings.ranks if rank >= ranks.world_size]
    if absent:
        log.message(f"notice: train.profile.ranks: {absent} are not there; the run has {ranks.world_size}")
    if ranks.rank not in settings.ranks:
        return contextlib.nullcontext(unprofiled)
    return StepProfile(
        config.train.output_dir,
        ranks.rank,
        start_step=settings.start_step,
        num_steps=settings.num_steps,
        with_memory=settings.memory,
        report=log.message if ranks.is_main else logger.info,
        pausing=lambda: meter.pause("profile"),
    )


def keep_each_adapter(config: RunConfig, log: MetricLog) -> Callable[[int, Path], None]:
    """What is told of each checkpoint that was written."""
    if config.train.wandb_artifacts != "all":
        return lambda position, path: None
    return lambda position, path: log.log_adapter(path, ADAPTER_FILES, position, [])


def keep_adapters(config: RunConfig, log: MetricLog, final: Path, step: int) -> None:
    """Hand the adapters of a run that is done to the services, as far as they are asked for.

    Args:
        config: of the run.
        log: that knows the services.
        final: where the adapter of the last step is.
        step: that it is of.
    """
    asked = config.train.wandb_artifacts
    if asked in ("final", "all"):
        log.log_adapter(final, ADAPTER_FILES, step, ["final"])
    if asked in ("best", "all"):
        best = read_best(config.train.output_dir, config.train.metric_for_best_model)
        if best is not None:
            log.log_adapter(config.train.output_dir / checkpoint_name(best.step), ADAPTER_FILES, best.step, ["best"])
