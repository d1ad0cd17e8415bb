"""From data_config.yaml and vlm_collator_config.yaml to sources, plan, processor and materialisers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlm_dist.config import DataSource, RunConfig
from vlm_dist.config.arithmetic import BatchArithmetic, resolve_interval
from vlm_dist.config.section import num_bytes
from vlm_dist.data.encoding.collate import RopePositions
from vlm_dist.data.encoding.packing import check_packing
from vlm_dist.data.lengths import LengthModel
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.plan.mix import repeats_of_weights
from vlm_dist.data.plan.plan import Mode, Plan, PlanSettings
from vlm_dist.data.purposes import ByPurpose
from vlm_dist.data.sources import missing_data, open_source
from vlm_dist.data.storage.shard_storage import CacheSettings, is_remote
from vlm_dist.data.types import Layout, PackBudget, Source
from vlm_dist.distributed.group import Ranks
from vlm_dist.distributed.patience import Work, long_work
from vlm_dist.errors import ConfigError, DataError, ModelError
from vlm_dist.families import Family, check_attention, choose_family
from vlm_dist.model import load_processor, load_rope_index
from vlm_dist.model.checkpoint_files import native_class_name
from vlm_dist.model.class_checks import naming_what_belongs
from vlm_dist.trainer_parts import Cadence

#: With fewer, packs are hard to balance and far from full.
MIN_SAMPLES_PER_PACK = 4
#: Reading ahead from local disks: enough to have a step in memory when its turn comes.
LOCAL_LOOKAHEAD_STEPS = 2


def open_sources(config: RunConfig, which: str, ranks: Ranks) -> list[Source]:
    """Open `data.train` or `data.eval`. Collective: every rank calls this.

    The first process of a node goes first: what has no index is indexed once, and the others find it. They wait for it
    however long it takes.
    """
    opened: list[Source] = []
    for turn in (True, False):
        with long_work(ranks, f"opening data.{which}", leaves_if_asked=True) as work:
            if (ranks.topology.local_rank == 0) is turn:
                opened = open_sources_alone(config, which, work)
    return opened


def open_sources_alone(config: RunConfig, which: str, work: Work | None = None) -> list[Source]:
    """Open `data.train` or `data.eval` in this process.

    Args:
        config: of the run.
        which: "train" or "eval".
        work: is told which source is being opened.

    Raises:
        ConfigError: there are none to train on.
        DataError: a source cannot be opened.
    """
    settings = getattr(config.data, which)
    if which == "train" and not settings:
        raise ConfigError("data_config.yaml: data.train is empty; name at least one source of samples")
    opened: list[Source] = []
    for i, one in enumerate(settings):
        if work is not None:
            work.doing = f"opening data.{which}[{i}]" + (f" ({one.name})" if one.name else "")
        try:
            opened.append(open_one_source(config, one))
        except DataError as error:
            later = [*settings[i + 1 :], *(config.data.eval if which == "train" else ())]
            others = [problem for other in later if (problem := missing_data(other)) is not None]
            if not others:
                raise
            raise DataError("\n".join([str(error), *dict.fromkeys(others)])) from error
    return opened


def open_one_source(config: RunConfig, settings: DataSource) -> Source:
    """Open one entry of `data.train` or `data.eval` in this process.

    Raises:
        DataError: it cannot be opened.
    """
    columns = config.collator.dataset_columns.mapping
    media = {columns[key] for key in ("image_column", "video_column") if key in columns}
    used = set(config.collator.required_columns.values()) if config.train.remove_unused_columns else None
    return open_source(settings, config.data.index_dir, media, used, cache_settings(config))


def cache_settings(config: RunConfig) -> CacheSettings:
    """How copies of shards are kept on this machine."""
    cache = config.data.cache
    return CacheSettings(cache.dir, num_bytes(cache.max_size), cache.mode, cache.lookahead_steps, cache.stage_files)


def lookahead_steps(config: RunConfig) -> int:
    """How many steps before they are needed samples are announced: far where whole shards have to be fetched."""
    paths = [[one.path] if isinstance(one.path, str) else one.path or [] for one in config.data.train]
    are_copied = any(is_remote(path) for of_source in paths for path in of_source)
    if config.data.cache.stage_files:
        are_copied |= any(one.type == "tar" for one in config.data.train)
    return config.data.cache.lookahead_steps if are_copied else LOCAL_LOOKAHEAD_STEPS


def make_processor(config: RunConfig) -> tuple[Any, Family]:
    """The model's processor, and its row in the table of families.

    Raises:
        ConfigError: the attention implementation computes something else than the family means.
    """
    loading = config.model.loading_for(config.model_id)
    processor = load_processor(
        config.model_id, config.model_entry, config.model.processor_for(config.model_id), loading
    )
    family = find_family(config, type(processor).__name__)
    check_attention(family, loading.attn_implementation)
    return processor, family


def find_family(config: RunConfig, processor: str | None = None) -> Family:
    """The model's row in the table of families, or its own; reads the model's config.json alone.

    Args:
        config: of the run.
        processor: name of the processor's class; None: the one that `model_classes` or the checkpoint names.
    """
    from transformers import PretrainedConfig

    revision = config.model.loading_for(config.model_id).revision or "main"
    try:
        facts, _ = PretrainedConfig.get_config_dict(config.model_id, revision=revision)
    except OSError as error:
        raise ModelError(f"{config.model_id}: its config.json cannot be read: {error}") from error
    entry = config.model_entry
    where = f"model_classes.{config.model_id}"
    name = processor or entry.processor_class or native_class_name(config.model_id, "processor_class", revision)
    return choose_family(entry.family, where, facts.get("model_type", ""), name or "")


def make_materialisers(
    config: RunConfig, train_sources: list[Source], eval_sources: list[Source], processor: Any, family: Family
) -> ByPurpose:
    """What the workers do, for each purpose.

    Raises:
        ConfigError: columns that the messages need are missing, or the family cannot do what is asked.
    """
    towers = towers_in_use(config, [*train_sources, *eval_sources])
    if is_packed(config):
        check_packing(family)
    rope_positions = make_rope_positions(config, family)
    revision = config.model.loading_for(config.model_id).revision

    def materialiser(sources: list[Source], for_generation: bool = False, held_out: bool = False) -> Materialiser:
        with naming_what_belongs(processor, config.model_entry, family.name, config.model_id, revision):
            return Materialiser(
                sources,
                processor,
                family,
                config.collator,
                towers,
                config.train.seed,
                for_generation,
                rope_positions,
                several_answers=held_out,
            )

    return ByPurpose(
        {
            "train": materialiser(train_sources),
            "eval": materialiser(eval_sources, held_out=True),
            "generate": materialiser(eval_sources, for_generation=True),
        }
    )


def make_rope_positions(config: RunConfig, family: Family) -> RopePositions | None:
    """What numbers tokens in the workers, for families whose positions have three parts; None: the model does.

    Raises:
        ModelError: samples are to be packed, and the model's class does not tell how it numbers them.
    """
    if family.packing != "mrope":
        return None
    loading = config.model.loading_for(config.model_id)
    try:
        return load_rope_index(config.model_id, loading.revision, loading.trust_remote_code)
    except ModelError:
        if is_packed(config):
            raise
        return None


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


def is_packed(config: RunConfig) -> bool:
    """Whether micro-batches of training are packs."""
    return config.train.packing


def make_plan(
    config: RunConfig,
    sources: list[Source],
    batch: BatchArithmetic,
    lengths: LengthModel | None = None,
    ranks_per_node: int = 1,
) -> Plan:
    """The plan of the training run.

    Args:
        config: of the run.
        sources: `data.train`.
        batch: how large a step is, and for how many ranks.
        lengths: predicts costs, as `vlm_dist.build.lengths` makes it; None: rough estimates from facts alone, which
            are another plan than the run's where it goes by length.
        ranks_per_node: today's, as `ranks_per_node` finds it.
    """
    train_config = config.train
    mode: Mode = "packing" if is_packed(config) else "group_by_length" if train_config.group_by_length else "padding"
    settings = PlanSettings(
        global_batch_size=batch.global_batch_size,
        micro_batch_size=batch.per_device,
        mode=mode,
        seed=train_config.seed,
        num_epochs=train_config.num_train_epochs,
        max_steps=train_config.max_steps if train_config.max_steps > 0 else None,
        pack=pack_budget(config) if is_packed(config) else None,
        balance_scope=train_config.balance_scope,
    )
    return Plan(sources, source_repeats(config, sources), settings, lengths, Layout(batch.world_size, ranks_per_node))


def ranks_per_node(config: RunConfig, ranks: Ranks) -> int:
    """How many ranks each node has, in node-major order; 0 where that is not so. Collective: every rank calls this."""
    topology = ranks.topology
    if config.train.balance_scope == "world":
        return 1
    mine = (topology.local_world_size, topology.rank % topology.local_world_size == topology.local_rank)
    found = set(ranks.gather_objects(mine))
    return topology.local_world_size if found == {(topology.local_world_size, True)} else 0


def source_repeats(config: RunConfig, sources: list[Source]) -> list[float]:
    """Passes over each training source in an epoch."""
    weights = [one.weight for one in config.data.train if one.weight is not None]
    if weights:
        return repeats_of_weights(weights, [len(source) for source in sources])
    return [one.repeat for one in config.data.train]


def pack_budget(config: RunConfig) -> PackBudget:
    """What a pack may hold: by default as many tokens as the longest padded micro-batch would have."""
    train_config = config.train
    longest = train_config.per_device_train_batch_size * config.collator.text_processing.max_length
    return PackBudget(train_config.pack_max_tokens or longest, train_config.pack_max_patches)


def describe_plan(config: RunConfig, plan: Plan, batch: BatchArithmetic, step: int = 0) -> list[str]:
    """Lines for the log: what the plan does that the config does not say.

    Args:
        config: of the run.
        plan: of the run.
        batch: how large a step is, and for how many ranks.
        step: that stands for all of them.
    """
    lines = [f"notice: {notice}" for notice in (*plan.notices, *_odd_lengths(config, plan, batch, step))]
    budget = plan.settings.pack
    if budget is None or not 0 <= step < plan.num_steps:
        return lines
    num_packs = sum(any(ref is not None for ref in packed) for packed in plan.step(step).micro_batches)
    per_pack = sum(len(packed) for packed in plan.step(step).micro_batches) / max(num_packs, 1)
    patches = f" and {budget.max_patches} patches" if budget.max_patches is not None else ""
    lines.append(
        f"packs of up to {budget.max_tokens} tokens{patches}, about {per_pack:.1f} samples each; the plan decides how "
        f"many each rank has in a step, so that accumulation {batch.accumulation} counts for the global batch alone"
    )
    if per_pack < MIN_SAMPLES_PER_PACK:
        lines.append(
            f"notice: train.packing: packs have {per_pack:.1f} samples, too few to balance; raise pack_max_tokens, or "
            "the global batch (gradient_accumulation_steps), or use group_by_length"
        )
    return lines


def _odd_lengths(config: RunConfig, plan: Plan, batch: BatchArithmetic, step: int) -> Iterator[str]:
    """What is allowed, and hardly meant."""
    train_config = config.train
    warms_up = train_config.lr_scheduler_type != "constant"
    if warms_up and train_config.warmup_steps >= plan.num_steps:
        yield (
            f"train.warmup_steps {train_config.warmup_steps}: the run has {plan.num_steps} steps, so that its learning "
            "rate does not get to learning_rate and never falls"
        )
    if batch.global_batch_size > 2 * plan.num_epoch_samples:
        yield (
            f"a step has room for {batch.global_batch_size} samples, an epoch has {plan.num_epoch_samples}: the "
            "rest of it is empty; lower gradient_accumulation_steps or per_device_train_batch_size"
        )
    cadence = make_cadence(config, plan.num_steps)
    if cadence.stop_at_step is not None and 0 < cadence.stop_at_step <= step:
        yield f"train.stop_at_step is {cadence.stop_at_step}, and {step} steps are done: no step is trained"


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
