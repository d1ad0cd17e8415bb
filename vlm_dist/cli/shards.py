"""`vlm-dist shards`: tar shards and their indexes; each subcommand has a module of its own."""

from __future__ import annotations

from typing import Any

from vlm_dist.cli import shards_build, shards_index, shards_info, shards_show, shards_tokens, shards_verify
from vlm_dist.cli.arguments import Commands


def add_commands(commands: Commands) -> None:
    """Add `shards` and its subcommands."""
    shards = commands.add_parser("shards", help="build, index, check and show tar shards; count tokens")
    subcommands = shards.add_subparsers(required=True, metavar="SUBCOMMAND")
    modules: tuple[Any, ...] = (shards_build, shards_index, shards_info, shards_verify, shards_show, shards_tokens)
    for module in modules:
        module.add_commands(subcommands)
