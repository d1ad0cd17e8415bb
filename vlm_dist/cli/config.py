"""`vlm-dist config`: the resolved configuration."""

from __future__ import annotations

import argparse
import sys

from vlm_dist.cli.arguments import Commands, add_run


def add_commands(commands: Commands) -> None:
    """Add `config`."""
    config = commands.add_parser("config", help="check a run file and print the resolved configuration")
    add_run(config)
    config.set_defaults(command=show_config)


def show_config(options: argparse.Namespace) -> None:
    """Print the resolved configuration, and what is worth a notice."""
    from vlm_dist.config import load_run

    config = load_run(options.run, options.overrides)
    print(config.to_yaml(), end="")
    for notice in config.notices:
        print(f"notice: {notice}", file=sys.stderr)
