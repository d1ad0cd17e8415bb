"""The composition root: the only reader of the whole config. Builds the parts in the order in which data flows.

sources -> plan -> processor -> materialiser -> feed -> model -> engine -> checkpoint -> trainer
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from vlm_dist import __version__
from vlm_dist.checkpoint import (
    Checkpoint,
    CheckpointStore,
    RunFacts,
    choose_checkpoint,
    restore_checkpoint,
    save_adapter,
    save_checkpoint,
)
from vlm_dist.config import RunConfig
from vlm_dist.config.arithmetic import BatchArithmetic, resolve_batch, resolve_interval
from vlm_dist.data.feed import FEED_FIELDS, StepFeed
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.plan import Plan, PlanSettings
from vlm_dist.data.purposes import ByPurpose, PurposePool
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.sources import open_source
from vlm_dist.data.types import Source
from vlm_dist.data.workers import WorkerPool
from vlm_dist.distributed.agreement import StepAgreement
from vlm_dist.distributed.environment import resolve_topology
from vlm_dist.distributed.failures import agree_on_failure
from vlm_dist.distributed.group import Ranks, init_process_groups, shut_down
from vlm_dist.distributed.signals import StopRequest
from vlm_dist.engine import Engine, load_deepspeed_json, merge_deepspeed_config, prepare_deepspeed, zero_init_context
from vlm_dist.errors import CheckpointError, ConfigError, ExitCode
from vlm_dist.evaluate import Evaluator
from vlm_dist.families import Family, family_for
from vlm_dist.model import (
    attach_adapter,
    enable_gradient_checkpointing,
    format_tower_table,
    load_model,
    load_processor,
    tower_table,
)
from vlm_dist.observability.log import MetricLog
from vlm_dist.observability.logging_setup import configure_logging
from vlm_dist.optim import make_lr_schedule, make_optimizer, parameter_groups
from vlm_dist.trainer import Cadence, Ending, Trainer


def train(config: RunConfig) -> ExitCode:
    """Run a configuration to its end, on whatever processes there are. Every rank calls this.

    Raises:
        VlmDistError: with one clear message, after all ranks have left together.
    """
    topology = resolve_topology(os.environ)
    prepare_deepspeed()
    configure_logging(topology.rank, topology.world_size)
    stop = StopRequest()
    stop.install()
    ranks = init_process_groups(topology)
    with run_parts(config, ranks, stop) as parts:
        ending = parts.trainer.run()
        parts.tell_ending(ending)
    shut_down()
    return ExitCode.PREEMPTED if ending is Ending.PREEMPTED else ExitCode.DONE


@dataclass(frozen=True)
class RunParts:
    """What is left to do when the loop has ended."""

    trainer: Trainer
    log: MetricLog
    publish_adapter: Callable[[], Any]

    def tell_ending(self, ending: Ending) -> None:
        """Say how it ended; publish the adapter of a complete run. Collective: every rank calls this."""
        position, total = self.trainer.position, self.trainer.cadence.num_steps
        if ending is Ending.COMPLETE:
            self.log.message(f"done: {total} steps; adapter: {self.publish_adapter()}")
        else:
            self.log.message(f"{ending.value} at step {position} of {total}; continue with --set train.resume=auto")
        self.trainer.ranks.barrier()  # nobody takes the engine apart while another still needs a collective


@contextmanager
def run_parts(config: RunConfig, ranks: Ranks, stop: StopRequest) -> Iterator[RunParts]:
    """Build all parts of a run, and take them apart again in the reverse order. Collective: every rank calls this."""
    train_config = config.train
    with ExitStack() as stack:
        log = MetricLog(
            train_config.output_dir,
            rank=ranks.rank,
            report_to=train_config.report_to,
            run_name=train_config.run_name or train_config.output_dir.resolve().name,
            config=config.dump(),
            wandb_project=train_config.wandb_project,
        )
        store = CheckpointStore(train_config.output_dir, train_config.save_total_limit, report=log.message)
        _prepare_output_dir(config, store, ranks)
        checkpoint = choose_checkpoint(store, ranks, train_config.resume)
        for notice in config.notices:
            log.message(f"notice: {notice}")

        # Data: sources, then the plan, which is all that decides what is trained on.
        with agree_on_failure(ranks):
            ds_json = load_deepspeed_json(config.deepspeed)
            batch = _resolve_batch(config, ranks, checkpoint)
        train_sources = open_sources(config, "train", ranks)
        eval_sources = open_sources(config, "eval", ranks)
        with agree_on_failure(ranks):
            plan = make_plan(config, train_sources, batch)
            if checkpoint is not None:
                plan.check_state(checkpoint.info["plan"])
                _check_end(checkpoint, plan)
            cadence = make_cadence(config, plan.num_steps)
            processor, family = make_processor(config)
            materialise = make_materialisers(config, train_sources, eval_sources, processor, family)
        start = checkpoint.step if checkpoint is not None else 0
        log.message(f"{batch}; {plan.steps_per_epoch} steps per epoch, {plan.num_steps} steps in all")

        # Model: loaded partitioned under ZeRO-3, then wrapped; the adapter's start depends on the seed alone.
        merge = _ds_merger(config, ds_json, ranks)
        with zero_init_context(merge(None)[0]):
            model = load_model(
                config.model_id,
                config.model_entry,
                config.model.loading_for(config.model_id),
                dtype=train_config.precision,
            )
            model = attach_adapter(model, config.peft, config.peft.towers.model_dump(), seed=train_config.seed)
        if train_config.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        table = tower_table(model, config.peft.towers.model_dump())
        log.message(format_tower_table(table))
        ds_config, derived = merge(table[-1].num_trainable)
        for value in derived:
            log.message(f"derived: {value}")
        engine = Engine.initialise(
            model,
            lambda groups: make_optimizer(train_config, groups),
            parameter_groups(model, train_config.weight_decay),
            make_lr_schedule(train_config, plan.num_steps),
            ds_config,
            control_group=ranks.control,
        )
        stack.callback(engine.close)
        if checkpoint is not None:
            restore_checkpoint(checkpoint, engine, ranks)
            log.message(f"resumed from {checkpoint.path} at step {start} of {plan.num_steps}")
            for change in _schedule_changes(config, checkpoint):
                log.message(f"notice: {change}")

        # The loop's own parts; whatever has processes or files is closed with the stack.
        quarantine = stack.enter_context(Quarantine(train_config.output_dir, ranks.rank))
        has_gpu = engine.device.type == "cuda"
        if train_config.dataloader_pin_memory and not has_gpu:
            log.message("notice: train.dataloader_pin_memory: true has no effect without a GPU")
        pool = WorkerPool(
            materialise,
            train_config.dataloader_num_workers,
            pin_memory=train_config.dataloader_pin_memory and has_gpu,
        )
        stack.callback(pool.close)
        feed = StepFeed(
            plan,
            pool,
            rank=ranks.rank,
            world_size=ranks.world_size,
            agreement=StepAgreement(FEED_FIELDS, ranks.agreement, ranks.world_size),
            start_step=start,
            prefetch_steps=train_config.dataloader_prefetch_factor,
            stop_requested=lambda: bool(stop),
            quarantine=quarantine,
        )
        stack.callback(feed.close)
        log.start(start_step=start, num_steps=plan.num_steps)
        stack.push(log)

        facts = _run_facts(config, batch, engine, ranks)
        yield RunParts(
            trainer=Trainer(
                engine=engine,
                feed=feed,
                ranks=ranks,
                cadence=cadence,
                log=log,
                save=lambda position: str(save_checkpoint(store, engine, ranks, position, facts(plan.state(position)))),
                evaluator=make_evaluator(config, ranks, engine, eval_sources, pool, processor),
                seed=train_config.seed,
                start=start,
                ignore_index=config.collator.label_masking.ignore_index,
            ),
            log=log,
            publish_adapter=lambda: save_adapter(store, engine, ranks),
        )


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


def _resolve_batch(config: RunConfig, ranks: Ranks, checkpoint: Checkpoint | None) -> BatchArithmetic:
    """The global batch belongs to the run: on resume the checkpoint's wins, and accumulation follows."""
    saved = checkpoint.info["global_batch_size"] if checkpoint is not None else None
    return resolve_batch(config.train, ranks.world_size, saved, allow_idle=True)


def _prepare_output_dir(config: RunConfig, store: CheckpointStore, ranks: Ranks) -> None:
    """Refuse to mix two runs in one directory; write the resolved config. Collective: every rank calls this."""
    output_dir = config.train.output_dir
    with agree_on_failure(ranks):
        if ranks.is_main:
            if config.train.resume is False and store.latest() is not None:
                raise CheckpointError(
                    f"{output_dir} has checkpoints of an earlier run, and resume is false; set train.resume=auto to "
                    "continue it, or another train.output_dir"
                )
            try:
                output_dir.mkdir(parents=True, exist_ok=True)
                config.write(output_dir / "resolved_config.yaml")
            except OSError as error:
                raise ConfigError(
                    f"train.output_dir: cannot write to {output_dir}: {error.strerror}; "
                    "name a directory that can be written"
                ) from error


def _check_end(checkpoint: Checkpoint, plan: Plan) -> None:
    """Refuse a run that ends before its checkpoint: its adapter would not be what the configuration says."""
    if checkpoint.step > plan.num_steps:
        raise CheckpointError(
            f"{checkpoint.path} has done {checkpoint.step} steps, but the run has {plan.num_steps}; raise "
            "train.max_steps or train.num_train_epochs, or resume from an earlier checkpoint"
        )


def _schedule_changes(config: RunConfig, checkpoint: Checkpoint) -> list[str]:
    """What the learning rate depends on, and differs from the checkpoint's: legal, but the curve has a bend there."""
    saved, now = checkpoint.info.get("scheduler", {}), _schedule_facts(config)
    return [
        f"train.{key}: {saved[key]} in the checkpoint, now {value}"
        for key, value in now.items()
        if key in saved and saved[key] != value
    ]


def _ds_merger(
    config: RunConfig, ds_json: dict[str, Any], ranks: Ranks
) -> Callable[[int | None], tuple[dict[str, Any], list[Any]]]:
    """Merge DeepSpeed's config; the number of trainable parameters is known only when the model is loaded."""
    num_nodes = max(1, ranks.world_size // ranks.topology.local_world_size)
    return lambda num_trainable: merge_deepspeed_config(
        ds_json,
        per_device_train_batch_size=config.train.per_device_train_batch_size,
        bf16=config.train.bf16,
        fp16=config.train.fp16,
        max_grad_norm=config.train.max_grad_norm,
        world_size=ranks.world_size,
        num_nodes=num_nodes,
        num_trainable=num_trainable,
    )


def _run_facts(
    config: RunConfig, batch: BatchArithmetic, engine: Engine, ranks: Ranks
) -> Callable[[dict[str, Any]], RunFacts]:
    """What a checkpoint says besides tensors, given the plan's state."""
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "deepspeed")}
    resolved = config.to_yaml()
    return lambda plan_state: RunFacts(
        plan=plan_state,
        global_batch_size=batch.global_batch_size,
        resolved_config=resolved,
        scheduler=_schedule_facts(config),
        versions={"vlm-dist": __version__, **versions, "python": platform.python_version()},
        topology={"world_size": ranks.world_size, "zero_stage": engine.zero_stage},
    )


def _schedule_facts(config: RunConfig) -> dict[str, Any]:
    """What the schedule of the learning rate is made from."""
    keys = (
        "lr_scheduler_type",
        "learning_rate",
        "warmup_ratio",
        "warmup_steps",
        "num_train_epochs",
        "max_steps",
    )
    return {key: getattr(config.train, key) for key in keys}


def make_evaluator(
    config: RunConfig, ranks: Ranks, engine: Engine, sources: list[Source], pool: WorkerPool, processor: Any
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
        predictions_dir=train_config.output_dir / "predictions",
        ignore_index=config.collator.label_masking.ignore_index,
    )
