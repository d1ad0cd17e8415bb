"""`vlm-dist plan`: which samples a step sees, and what steps cost."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from vlm_dist.cli.arguments import Commands, add_run
from vlm_dist.errors import ConfigError

if TYPE_CHECKING:
    from vlm_dist.data.plan.plan import Plan
    from vlm_dist.data.types import MicroBatchJob, Source


def add_commands(commands: Commands) -> None:
    """Add `plan`."""
    plan = commands.add_parser("plan", help="name the samples that a step sees, before or after the fact")
    add_run(plan)
    plan.add_argument("--step", type=int, default=None, help="step, from 0; with --summary the first of those measured")
    plan.add_argument("--world-size", type=int, default=1, help="ranks of the run (%(default)s)")
    plan.add_argument("--ranks-per-node", type=int, default=None, help="for balance_scope: node (all on one node)")
    plan.add_argument("--rank", type=int, default=None, help="this rank's samples alone")
    plan.add_argument("--summary", action="store_true", help="predict padding, balance and packs, of several steps")
    plan.add_argument("--steps", type=int, default=64, help="how many --summary measures (%(default)s)")
    plan.set_defaults(command=show_plan)


def show_plan(options: argparse.Namespace) -> None:
    """Print one JSON line per slot of a step: rank, micro-batch, source, shard, key, predicted costs.

    A run that has a checkpoint has its global batch from there, as the trainer does on resume.
    """
    world_size = options.world_size
    if world_size < 1 or not 0 <= (options.rank or 0) < world_size:
        raise ConfigError(
            f"--rank {options.rank} of --world-size {world_size}: expected a rank from 0 to {world_size - 1}"
        )
    if options.step is None and not options.summary:
        raise ConfigError("name a step (--step 0), or ask for --summary")
    plan, sources, notices = _make(options)
    first = options.step or 0
    if not 0 <= first < plan.num_steps:
        raise ConfigError(f"--step {first}: the run has steps 0 to {plan.num_steps - 1}")
    if options.summary:
        _print_summary(plan, range(first, min(first + max(options.steps, 1), plan.num_steps)), world_size, notices)
        return
    step = plan.step(first)
    for rank in range(world_size) if options.rank is None else [options.rank]:
        for job in step.for_rank(rank, world_size):
            _print_job(plan, sources, job, {"step": first, "rank": rank, "micro_batch": job.micro_batch})


def _make(options: argparse.Namespace) -> tuple[Plan, list[Source], list[str]]:
    """The run's plan, as the trainer makes it; and what there is to say about it."""
    from vlm_dist.build import (
        describe_plan,
        find_family,
        make_lengths,
        make_materialisers,
        make_plan,
        make_processor,
        open_sources_alone,
        plans_by_length,
    )
    from vlm_dist.build.continuation import planned_by
    from vlm_dist.config import load_run
    from vlm_dist.config.arithmetic import resolve_batch
    from vlm_dist.data.lengths.opening import fact_lengths

    config = load_run(options.run, options.overrides)
    sources = open_sources_alone(config, "train")
    checkpoint = planned_by(config)
    saved = checkpoint.info["global_batch_size"] if checkpoint is not None else None
    batch = resolve_batch(config.train, options.world_size, saved, allow_idle=True)
    if plans_by_length(config):
        processor, family = make_processor(config)
        materialise = make_materialisers(config, sources, [], processor, family)
        planned_with = checkpoint.info["plan"].get("lengths") if checkpoint is not None else None
        lengths = make_lengths(config, sources, processor, family, materialise, planned_with)
    else:
        lengths = fact_lengths(sources, find_family(config), config.collator)
    ranks_per_node = options.world_size if options.ranks_per_node is None else options.ranks_per_node
    plan = make_plan(config, sources, batch, lengths, ranks_per_node)
    return plan, sources, [str(batch), *describe_plan(config, plan, batch, options.step or 0)]


def _print_job(plan: Plan, sources: Sequence[Source], job: MicroBatchJob, line: dict[str, object]) -> None:
    """Print the slots of one micro-batch, each with its own costs and those of the whole."""
    from vlm_dist.data.plan.measure import job_costs

    (whole,) = job_costs(plan, [job])
    if not job.refs:
        print(json.dumps({**line, "null": "no sample"}))
    for ref in job.refs:
        if ref is None:
            print(json.dumps({**line, "null": "tail"}))
            continue
        origin, own = sources[ref.source].origin(ref.index), plan.costs([ref])
        sample = {"source": origin.source, "shard": origin.shard, "key": origin.key}
        costs = {"tokens": int(own.tokens[0]), "patches": int(own.patches[0])}
        batch = {"micro_batch_tokens": whole.computed_tokens, "micro_batch_patches": whole.patches}
        print(json.dumps({**line, **sample, **costs, **batch}, ensure_ascii=False))


def _print_summary(plan: Plan, steps: range, world_size: int, notices: Sequence[str]) -> None:
    """Print the figures of some steps as JSON, and what there is to say to stderr."""
    from vlm_dist.data.plan.measure import measure

    for notice in notices:
        print(notice, file=sys.stderr)
    figures = measure(plan, (plan.step(index) for index in steps), world_size)
    rounded = {name: round(value, 4) for name, value in asdict(figures).items()}
    print(
        json.dumps(
            {"mode": plan.settings.mode, "first_step": steps.start, "world_size": world_size, **rounded}, indent=2
        )
    )
