"""`vlm-dist`: what one wants to know before and after training.

Imports are inside the commands, so that the help comes at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vlm_dist.errors import ConfigError, ExitCode, VlmDistError


def main(arguments: list[str] | None = None) -> int:
    """Run a command; gives back the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except VlmDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except BrokenPipeError:  # `vlm-dist … | head`
        sys.stderr.close()
    return int(ExitCode.DONE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlm-dist",
        description="Tools around training. Training itself: python -m vlm_dist.train, deepspeed -m vlm_dist.train, "
        "or sbatch slurm/train.sbatch.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    config = commands.add_parser("config", help="check a run file and print the resolved configuration")
    _add_run(config)
    config.set_defaults(command=show_config)

    plan = commands.add_parser("plan", help="name the samples that a step sees, before or after the fact")
    _add_run(plan)
    plan.add_argument("--step", type=int, required=True, help="step, from 0")
    plan.add_argument("--world-size", type=int, default=1, help="ranks of the run (%(default)s)")
    plan.add_argument("--rank", type=int, default=None, help="this rank's samples alone")
    plan.set_defaults(command=show_plan)

    doctor = commands.add_parser("doctor", help="versions, devices, and which `deepspeed` command is installed")
    doctor.set_defaults(command=show_installation)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN.yaml", help="run file")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")


def show_config(options: argparse.Namespace) -> None:
    """Print the resolved configuration, and what is worth a notice."""
    from vlm_dist.config import load_run

    config = load_run(options.run, options.overrides)
    print(config.to_yaml(), end="")
    for notice in config.notices:
        print(f"notice: {notice}", file=sys.stderr)


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


def show_installation(options: argparse.Namespace) -> None:
    """Print versions and devices; say so if `deepspeed` is the stock command."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from launcher.entry_point_check import stock_deepspeed_notice

    print(f"python {platform.python_version()}")
    for package in (
        "vlm-dist",
        "torch",
        "transformers",
        "peft",
        "deepspeed",
        "datasets",
        "webdataset",
        "decord",
        "wandb",
    ):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} is not installed; fix: pip install -e .")
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"devices: {', '.join(names) if names else 'CPU only'}")
    print(stock_deepspeed_notice() or "deepspeed command: ours, -m works")


if __name__ == "__main__":
    sys.exit(main())
