"""From data_config.yaml and vlm_collator_config.yaml to sources, plan, processor and materialisers."""

from __future__ import annotations

from typing import Any

from vlm_dist.config import RunConfig
from vlm_dist.config.arithmetic import BatchArithmetic, resolve_interval
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.plan.plan import Plan, PlanSettings
from vlm_dist.data.purposes import ByPurpose
from vlm_dist.data.sources import open_source
from vlm_dist.data.types import Source
from vlm_dist.distributed.failures import agree_on_failure
from vlm_dist.distributed.group import Ranks
from vlm_dist.errors import ConfigError
from vlm_dist.families import Family, family_for
from vlm_dist.model import load_processor
from vlm_dist.trainer import Cadence


def open_sources(config: RunConfig, which: str, ranks: Ranks) -> list[Source]:
    """Open `data.train` or `data.eval`. Collective: every rank calls this.

    The first process of a node goes first: what has no index is indexed once, and the others find it.
    """
    opened: list[Source] = []
    for turn in (True, False):
        with agree_on_failure(ranks):
            if (ranks.topology.local_rank == 0) is turn:
                opened = open_sources_alone(config, which)
    return opened


def open_sources_alone(config: RunConfig, which: str) -> list[Source]:
    """Open `data.train` or `data.eval` in this process.

    Raises:
        ConfigError: there are none to train on.
        DataError: a source cannot be opened.
    """
    settings = getattr(config.data, which)
    if which == "train" and not settings:
        raise ConfigError("data_config.yaml: data.train is empty; name at least one source of samples")
    columns = config.collator.dataset_columns.mapping
    media = {columns[key] for key in ("image_column", "video_column") if key in columns}
    used = set(config.collator.required_columns.values()) if config.train.remove_unused_columns else None
    return [open_source(one, config.data.index_dir, media, used) for one in settings]


def make_processor(config: RunConfig) -> tuple[Any, Family]:
    """The model's processor, and its row in the table of families."""
    from transformers import PretrainedConfig

    loading = config.model.loading_for(config.model_id)
    processor = load_processor(
        config.model_id, config.model_entry, config.model.processor_for(config.model_id), loading
    )
    facts, _ = PretrainedConfig.get_config_dict(config.model_id, revision=loading.revision or "main")
    return processor, family_for(facts.get("model_type", ""))


def make_materialisers(
    config: RunConfig, train_sources: list[Source], eval_sources: list[Source], processor: Any, family: Family
) -> ByPurpose:
    """What the workers do, for each purpose.

    Raises:
        ConfigError: columns that the messages need are missing, or the family cannot do what is asked.
    """
    towers = towers_in_use(config, [*train_sources, *eval_sources])

    def materialiser(sources: list[Source], for_generation: bool = False) -> Materialiser:
        return Materialiser(sources, processor, family, config.collator, towers, config.train.seed, for_generation)

    return ByPurpose(
        {
            "train": materialiser(train_sources),
            "eval": materialiser(eval_sources),
            "generate": materialiser(eval_sources, for_generation=True),
        }
    )


def towers_in_use(config: RunConfig, sources: list[Source]) -> frozenset[str]:
    """What every micro-batch calls, fixed for the run: a rank without a picture must still take part under ZeRO-3."""
    columns = config.collator.dataset_columns
    switches = config.collator.data_processing
    wanted = {
        "image": columns.image_column if switches.image_data else None,
        "video": columns.video_column if switches.video_data else None,
    }
    return frozenset(
        kind for kind, column in wanted.items() if column and any(column in source.columns for source in sources)
    )


def make_plan(config: RunConfig, sources: list[Source], batch: BatchArithmetic) -> Plan:
    """The plan of the training run."""
    settings = PlanSettings(
        global_batch_size=batch.global_batch_size,
        micro_batch_size=batch.per_device,
        mode="group_by_length" if config.train.group_by_length else "padding",
        seed=config.train.seed,
        num_epochs=config.train.num_train_epochs,
        max_steps=config.train.max_steps if config.train.max_steps > 0 else None,
    )
    return Plan(sources, [one.repeat for one in config.data.train], settings)


def make_cadence(config: RunConfig, num_steps: int) -> Cadence:
    """Intervals in steps."""
    train_config = config.train
    stop_at = train_config.stop_at_step
    return Cadence(
        num_steps=num_steps,
        logging_steps=resolve_interval(train_config.logging_steps, num_steps),
        eval_steps=resolve_interval(train_config.eval_steps, num_steps),
        save_steps=resolve_interval(train_config.save_steps, num_steps),
        stop_at_step=None if stop_at is None else resolve_interval(stop_at, num_steps),
        eval_on_start=train_config.eval_on_start,
    )
