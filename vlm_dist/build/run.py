"""One run from its configuration to its end: the parts are built, the loop is run, everything is taken apart again."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlm_dist.build.continuation import (
    check_continuation,
    find_owed,
    fit_batch,
    is_own,
    prepare_output_dir,
    run_facts,
    write_description,
)
from vlm_dist.build.data import (
    describe_plan,
    lookahead_steps,
    make_cadence,
    make_materialisers,
    make_plan,
    make_processor,
    open_sources,
    ranks_per_node,
)
from vlm_dist.build.ending import collective_timeout, told_clearly
from vlm_dist.build.evaluation import make_evaluator, make_patience
from vlm_dist.build.lengths import describe_lengths, make_lengths
from vlm_dist.build.life import RunLife
from vlm_dist.build.memory_check import guard_memory, make_worst_case
from vlm_dist.build.metering import keep_adapters, make_log, make_meter, make_profile, show_pictures
from vlm_dist.build.model import make_model
from vlm_dist.build.parts import ds_merger, make_engine, make_pool
from vlm_dist.build.saving import check_best_metric, make_saver, publish_adapter
from vlm_dist.checkpoint import (
    CheckpointStore,
    choose_checkpoint,
    leave_later_checkpoints,
    open_starting_point,
    restore_checkpoint,
    start_from,
)
from vlm_dist.config import RunConfig
from vlm_dist.data.feed import FEED_FIELDS, StepFeed
from vlm_dist.data.ledger import SampleLedger
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.distributed.agreement import StepAgreement
from vlm_dist.distributed.collectives import compare_collectives
from vlm_dist.distributed.environment import resolve_topology
from vlm_dist.distributed.failures import agree_on_failure
from vlm_dist.distributed.group import Ranks, init_process_groups, shut_down
from vlm_dist.distributed.patience import long_work
from vlm_dist.distributed.signals import AskedToStop, StopRequest
from vlm_dist.engine import (
    GarbageCollection,
    NonfiniteSteps,
    load_deepspeed_json,
    prepare_deepspeed,
    prepare_native_ops,
)
from vlm_dist.errors import ExitCode
from vlm_dist.model import check_compilation, check_quantization, prepare_checkpoint, tower_namer, try_compiler
from vlm_dist.observability.log import MetricLog
from vlm_dist.observability.logging_setup import configure_logging
from vlm_dist.trainer import Trainer
from vlm_dist.trainer_parts import Ending


def train(config: RunConfig, stop: StopRequest | None = None) -> ExitCode:
    """Run a configuration to its end, on whatever processes there are. Every rank calls this.

    Args:
        config: of the run.
        stop: listens to the signals of this process already; None: it is made here.

    Raises:
        VlmDistError: with one clear message, after all ranks have left together.
    """
    topology = resolve_topology(os.environ)
    prepare_deepspeed()
    configure_logging(topology.rank, topology.world_size)
    if stop is None:
        stop = StopRequest()
        stop.install()
    if config.train.debug_collectives:
        compare_collectives()
    ranks = init_process_groups(topology, collective_timeout(config.train), stop)
    ending = Ending.PREEMPTED
    try:
        with (
            RunLife(config.train.output_dir, ranks) as life,
            told_clearly(config.train, ranks),
            run_parts(config, ranks, life) as parts,
        ):
            ending = parts.trainer.run()
            parts.tell_ending(ending)
    except AskedToStop as asked:
        if ranks.is_main:
            logging.getLogger(__name__).info("stopped by a signal at start-up (%s); there is nothing to save", asked)
    shut_down()
    return ExitCode.PREEMPTED if ending is Ending.PREEMPTED else ExitCode.DONE


@dataclass(frozen=True)
class RunParts:
    """What is left to do when the loop has ended."""

    trainer: Trainer
    log: MetricLog
    publish_adapter: Callable[[], Path]
    keep_adapters: Callable[[Path, int], None]
    life: RunLife

    def tell_ending(self, ending: Ending) -> None:
        """Say how it ended; publish the adapter of a complete run. Collective: every rank calls this."""
        position, total = self.trainer.position, self.trainer.cadence.num_steps
        if ending is Ending.COMPLETE:
            adapter = self.publish_adapter()
            self.log.message(f"done: {position} steps; adapter: {adapter}")
            self.keep_adapters(adapter, position)
            self.life.done(position, adapter)
        else:
            self.log.message(f"{ending.value} at step {position} of {total}; continue with --set train.resume=auto")
            self.life.stopped(position, ending.value)
        self.trainer.ranks.barrier()  # nobody takes the engine apart while another still needs a collective


@contextmanager
def run_parts(config: RunConfig, ranks: Ranks, life: RunLife | None = None) -> Iterator[RunParts]:
    """Build all parts of a run, and take them apart again in the reverse order. Collective: every rank calls this.

    Args:
        config: of the run.
        ranks: this process among its peers.
        life: writes down the start, and later how it ended; None: only the start is.
    """
    train_config = config.train
    life = life or RunLife(train_config.output_dir, ranks)
    ranks.leave_if_asked()
    with ExitStack() as stack, ranks.progress.until_leaving():
        with agree_on_failure(ranks):
            log = make_log(config, ranks)
        store = CheckpointStore(train_config.output_dir, report=log.message)
        places = prepare_output_dir(config, store, ranks)
        checkpoint = choose_checkpoint(store, ranks, train_config.resume, places)
        for notice in config.notices:
            log.message(f"notice: {notice}")

        # Data: sources, then the plan, which is all that decides what is trained on.
        with agree_on_failure(ranks):
            ds_json = load_deepspeed_json(config.deepspeed)
            check_quantization(config.peft.quantization, ds_json["zero_optimization"]["stage"])
            check_compilation(train_config.torch_compile, ds_json["zero_optimization"]["stage"])
            batch = fit_batch(config, ranks, checkpoint)
        train_sources = open_sources(config, "train", ranks)
        eval_sources = open_sources(config, "eval", ranks)
        differences: list[str] = []
        loading_params = config.model.loading_for(config.model_id)
        # a conversion may take longer than a collective waits
        with long_work(ranks, f"preparing {config.model_id}", leaves_if_asked=True):
            prepare_checkpoint(config.model_id, config.model_entry, loading_params)
            prepare_native_ops(ds_json)  # offloading compiles what it needs, the first time
            if train_config.torch_compile:
                try_compiler(train_config.torch_compile_backend)
        with agree_on_failure(ranks):
            check_best_metric(config, eval_sources)
            processor, family = make_processor(config)
            materialise = make_materialisers(config, train_sources, eval_sources, processor, family)
            show_pictures(config, ranks, log, eval_sources, family)
        planned_with = checkpoint.info["plan"].get("lengths") if checkpoint is not None else None
        lengths = make_lengths(config, train_sources, processor, family, materialise, planned_with, ranks)
        per_node = ranks_per_node(config, ranks)
        with agree_on_failure(ranks):
            plan = make_plan(config, train_sources, batch, lengths, per_node)
            if checkpoint is not None:
                differences = check_continuation(config, checkpoint, plan)
            about_plan = describe_plan(config, plan, batch, checkpoint.step if checkpoint is not None else 0)
            cadence = make_cadence(config, plan.num_steps)
            if ranks.is_main:  # only now: a run that is refused leaves that of the run before it alone
                write_description(config, plan)
        start = checkpoint.step if checkpoint is not None else 0
        life.begin(
            start,
            num_steps=plan.num_steps,
            global_batch_size=batch.global_batch_size,
            resumed_from=checkpoint.path.name if checkpoint is not None else None,
            started_from=str(config.peft.adapter) if checkpoint is None and config.peft.adapter is not None else None,
        )
        log.message(f"{batch}; {plan.steps_per_epoch} steps per epoch, {plan.num_steps} steps in all")
        if (told := describe_lengths(config, lengths)) is not None:
            log.message(told)
        for line in about_plan:
            log.message(line)

        ranks.leave_if_asked()
        # Model: its start depends on the seed alone, or on what it is told to start from; then wrapped.
        begin = open_starting_point(config.peft, ranks, processor) if checkpoint is None else None
        merge = ds_merger(config, ds_json, ranks)
        model, num_trainable = make_model(config, merge(None)[0], processor, ranks, log.message)
        ranks.leave_if_asked()
        started = begin.parameter_names(model) if begin is not None else {}
        ds_config, derived = merge(num_trainable)
        for value in derived:
            log.message(f"derived: {value}")
        engine = make_engine(config, model, ds_config, plan.num_steps, ranks, log.message)
        stack.callback(engine.close)
        if checkpoint is not None:
            restore_checkpoint(checkpoint, engine, ranks)
            log.message(f"resumed from {checkpoint.path} at step {start} of {plan.num_steps}")
            for change in differences:
                log.message(f"notice: {change}")
        elif begin is not None:
            start_from(begin, engine, started, ranks)
            log.message(f"started from {begin.path}: {len(started)} weights")

        guard = guard_memory(
            config,
            engine,
            ds_config,
            ranks,
            log.message,
            lambda: make_worst_case(config, train_sources, eval_sources, processor, family, batch.per_device),
        )

        is_ours = is_own(config, checkpoint, ranks)
        if is_ours and train_config.resume != "auto":
            leave_later_checkpoints(store, ranks, places, start)
        owed = find_owed(cadence, start, log, ranks, is_own=is_ours)

        # The loop's own parts; whatever has processes or files is closed with the stack.
        quarantine = stack.enter_context(Quarantine(train_config.output_dir, ranks.rank))
        ledger = None
        if train_config.sample_ledger:
            ledger = stack.enter_context(SampleLedger.open(train_config.output_dir, ranks, start))
        has_gpu = engine.device.type == "cuda"
        if train_config.dataloader_pin_memory and not has_gpu:
            log.message("notice: train.dataloader_pin_memory: true has no effect without a GPU")
        pool = make_pool(config, materialise, has_gpu)
        stack.callback(pool.close)
        facts = run_facts(config, batch, engine, ranks, plan.num_steps)
        saver = make_saver(
            config,
            ranks,
            engine,
            places,
            plan.num_steps,
            lambda at: facts(plan.state(at)),
            log,
            resumed_at=start if is_ours else -1,
        )
        feed = StepFeed(
            plan,
            pool,
            rank=ranks.rank,
            world_size=ranks.world_size,
            agreement=StepAgreement(FEED_FIELDS, ranks.agreement, ranks.world_size),
            start_step=start,
            prefetch_steps=train_config.dataloader_prefetch_factor,
            stop_requested=lambda: ranks.stop.number,
            save_failed=lambda: saver.has_failed,
            quarantine=quarantine,
            max_bad_share=config.data.max_bad_share,
            sources=train_sources,
            lookahead_steps=lookahead_steps(config),
        )
        stack.callback(feed.close)
        log.start(start_step=start, num_steps=plan.num_steps)
        stack.push(log)
        stack.push(saver)  # closed before the log: it still has something to tell
        meter = make_meter(config, ranks, cadence, log, model, engine, train_sources, start)
        profiling = stack.enter_context(make_profile(config, ranks, log, meter))

        yield RunParts(
            trainer=Trainer(
                engine=engine,
                feed=feed,
                ranks=ranks,
                cadence=cadence,
                log=log,
                saver=saver,
                evaluator=make_evaluator(config, ranks, engine, eval_sources, pool, processor, quarantine),
                patience=make_patience(config, ranks, checkpoint),
                seed=train_config.seed,
                start=start,
                ignore_index=config.collator.label_masking.ignore_index,
                explaining=guard.explaining,
                profiling=profiling,
                meter=meter,
                owed=owed,
                garbage=GarbageCollection(train_config.gc_steps),
                ledger=ledger,
                nonfinite=NonfiniteSteps(
                    train_config.nonfinite_steps,
                    train_config.max_nonfinite_steps,
                    ranks,
                    log.message,
                    tower_namer(model),
                ),
            ),
            log=log,
            publish_adapter=lambda: publish_adapter(config, store, engine, ranks, log.message),
            keep_adapters=lambda adapter, step: keep_adapters(config, log, adapter, step),
            life=life,
        )
