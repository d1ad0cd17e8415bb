"""`vlm-dist eval`: an adapter on held-out samples, in one process."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm_dist.cli.arguments import Commands
from vlm_dist.entry import guarded
from vlm_dist.eval import add_arguments, evaluate


def add_commands(commands: Commands) -> None:
    """Add `eval`."""
    parser = commands.add_parser(
        "eval",
        help="loss and generated answers of an adapter on held-out samples",
        description="Evaluate an adapter, or the base, as training evaluates: loss, and metrics of generated answers. "
        "Writes figures and answers into a folder of its own in output_dir/eval, and prints the figures.",
        epilog="On several GPUs: deepspeed --num_gpus 8 -m vlm_dist.eval --config RUN.yaml with the same options "
        "(torchrun and srun likewise).",
    )
    parser.add_argument("run", type=Path, metavar="RUN.yaml", help="run file, or a run's resolved_config.yaml")
    add_arguments(parser)
    parser.set_defaults(command=evaluate_alone)


def evaluate_alone(options: argparse.Namespace) -> int:
    """Evaluate in this process."""
    return guarded(lambda stop: evaluate(options.run, options, stop))
