"""`vlm-dist shards info`: what there is in some shards."""

from __future__ import annotations

import argparse
import json

from vlm_dist.cli.arguments import Commands
from vlm_dist.cli.messages import counted
from vlm_dist.cli.shards_index import add_shard_paths, find_shards


def add_commands(commands: Commands) -> None:
    """Add `info`."""
    parser = commands.add_parser("info", help="sum up shards from their indexes: samples, columns, lengths")
    add_shard_paths(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=info)


def info(options: argparse.Namespace) -> None:
    """Print a summary of some shards.

    Raises:
        DataError: some are damaged.
    """
    from vlm_dist.data.shards.info import describe_info, sum_up
    from vlm_dist.errors import DataError

    found = sum_up(find_shards(options.path), options.index_dir)
    print(json.dumps(found.as_json(), ensure_ascii=False) if options.json else describe_info(found))
    if found.damaged:
        raise DataError(f"{len(found.damaged)} of {counted(found.num_shards, 'shard')} damaged")
