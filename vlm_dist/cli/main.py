"""`vlm-dist`: what one wants to know and to do before and after training.

Imports are inside the commands, so that the help comes at once. Every module of this package has `add_commands`.
"""

from __future__ import annotations

import argparse
import sys

from vlm_dist.cli import config, doctor, launch, plan, quarantine, shards
from vlm_dist.errors import ExitCode, VlmDistError


def main(arguments: list[str] | None = None) -> int:
    """Run a command; gives back the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code = options.command(options)  # most give back nothing
    except VlmDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except BrokenPipeError:  # `vlm-dist … | head`
        sys.stderr.close()
        code = None
    return int(ExitCode.DONE if code is None else code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlm-dist",
        description="Tools around training. Training itself: python -m vlm_dist.train, deepspeed -m vlm_dist.train, "
        "or sbatch slurm/train.sbatch.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (config, plan, shards, quarantine, launch, doctor):
        module.add_commands(commands)
    return parser
