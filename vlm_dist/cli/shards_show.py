"""`vlm-dist shards show`: one sample."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm_dist.cli.arguments import Commands
from vlm_dist.cli.shards_index import add_shard_paths, find_shards


def add_commands(commands: Commands) -> None:
    """Add `show`."""
    parser = commands.add_parser("show", help="show or extract one sample")
    add_shard_paths(parser, several=False)
    parser.add_argument("key", metavar="KEY", help="of the sample, also as errors print it: shard.tar:key")
    parser.add_argument(
        "--extract", type=Path, default=None, metavar="DIR", help="write the members into this directory"
    )
    parser.set_defaults(command=show)


def show(options: argparse.Namespace) -> None:
    """Print a sample's members, and write them to files if wanted."""
    from vlm_dist.cli.messages import show_messages
    from vlm_dist.data.shards.show import describe_sample, extract_sample, find_sample

    show_messages()
    sample = find_sample(find_shards(options.path), options.key, options.index_dir)
    for line in describe_sample(sample):
        print(line)
    if options.extract is not None:
        for path in extract_sample(sample, options.extract):
            print(f"wrote {path}")
