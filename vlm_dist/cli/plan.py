"""`vlm-dist plan`: which samples a step sees."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vlm_dist.cli.arguments import Commands, add_run
from vlm_dist.errors import ConfigError


def add_commands(commands: Commands) -> None:
    """Add `plan`."""
    plan = commands.add_parser("plan", help="name the samples that a step sees, before or after the fact")
    add_run(plan)
    plan.add_argument("--step", type=int, required=True, help="step, from 0")
    plan.add_argument("--world-size", type=int, default=1, help="ranks of the run (%(default)s)")
    plan.add_argument("--rank", type=int, default=None, help="this rank's samples alone")
    plan.set_defaults(command=show_plan)


def show_plan(options: argparse.Namespace) -> None:
    """Print one JSON line per slot of a step: rank, micro-batch, source, shard, key.

    A run that has a checkpoint has its global batch from there, as the trainer does on resume.
    """
    from vlm_dist.build import make_plan, open_sources_alone
    from vlm_dist.checkpoint import CheckpointStore
    from vlm_dist.config import load_run
    from vlm_dist.config.arithmetic import resolve_batch

    config = load_run(options.run, options.overrides)
    world_size = options.world_size
    if world_size < 1 or not 0 <= (options.rank or 0) < world_size:
        raise ConfigError(
            f"--rank {options.rank} of --world-size {world_size}: expected a rank from 0 to {world_size - 1}"
        )
    sources = open_sources_alone(config, "train")
    store, resume = CheckpointStore(config.train.output_dir), config.train.resume
    checkpoint = store.latest() if resume is False or resume == "auto" else store.load(Path(resume))
    saved = checkpoint.info["global_batch_size"] if checkpoint is not None else None
    plan = make_plan(config, sources, resolve_batch(config.train, world_size, saved, allow_idle=True))
    if not 0 <= options.step < plan.num_steps:
        raise ConfigError(f"--step {options.step}: the run has steps 0 to {plan.num_steps - 1}")
    step = plan.step(options.step)
    for rank in range(world_size) if options.rank is None else [options.rank]:
        for job in step.for_rank(rank, world_size):
            for ref in job.refs:
                origin = None if ref is None else sources[ref.source].origin(ref.index)
                line = {"step": step.step, "rank": rank, "micro_batch": job.micro_batch}
                where = (
                    {"source": origin.source, "shard": origin.shard, "key": origin.key} if origin else {"null": "tail"}
                )
                print(json.dumps({**line, **where}, ensure_ascii=False))
