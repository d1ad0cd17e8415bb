"""`vlm-dist shards index`: indexes of tars that exist already."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from vlm_dist.cli.arguments import Commands
from vlm_dist.cli.messages import counted


def add_shard_paths(parser: argparse.ArgumentParser, several: bool = True) -> None:
    """Add the shards that a command is about, and where their indexes may lie."""
    parser.add_argument(
        "path",
        metavar="PATH",
        nargs="+" if several else None,  # type: ignore[arg-type]
        help="a tar, a directory of tars, a glob, or a brace pattern such as 'train-{000..099}.tar'",
    )
    parser.add_argument(
        "--index-dir", type=Path, default=None, metavar="DIR", help="where indexes lie that are not beside their tar"
    )


def find_shards(patterns: Sequence[str] | str) -> list[Path]:
    """List the tars that PATH arguments mean.

    Raises:
        DataError: if there are none.
    """
    from vlm_dist.data.storage.find import find_files
    from vlm_dist.errors import DataError

    patterns = [patterns] if isinstance(patterns, str) else patterns
    records = [pattern for pattern in patterns if pattern.endswith((".jsonl", ".ndjson", ".json"))]
    if records:
        raise DataError(
            f"{records[0]}: is no tar; messages name its records by line, as {Path(records[0]).name}:LINE "
            f"(sed -n 'LINEp' {shlex.quote(records[0])} prints one), in a list by their number"
        )
    return list(dict.fromkeys(path for pattern in patterns for path in find_files("PATH", pattern, (".tar",))))


def add_commands(commands: Commands) -> None:
    """Add `index`."""
    parser = commands.add_parser(
        "index",
        help="index existing tars by their headers, and name the damaged ones",
        description="Writes PATH.index.arrow beside every tar (or under --index-dir), and manifest.json into "
        "directories whose tars are all sound. Shards that have an index of their present size and time are skipped.",
    )
    add_shard_paths(parser)
    parser.add_argument("--workers", type=int, default=None, metavar="N", help="processes (as many as there are cores)")
    parser.add_argument(
        "--checksums", action="store_true", help="read all content and keep checksums, for `shards verify`"
    )
    parser.add_argument("--force", action="store_true", help="make all indexes again")
    parser.set_defaults(command=index)


def index(options: argparse.Namespace) -> None:
    """Index tars; all damaged ones are named, and the others indexed all the same."""
    from vlm_dist.cli.messages import show_messages
    from vlm_dist.data.index.progress import ShardProgress
    from vlm_dist.data.shards.update_indexes import update_indexes
    from vlm_dist.data.storage.shard_storage import is_remote
    from vlm_dist.errors import ConfigError, DataError

    show_messages()
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: expected 1 or more")
    if any(is_remote(path) for path in options.path):
        _index_remote(options)
        return
    paths = find_shards(options.path)
    with ShardProgress("indexing") as progress:
        update = update_indexes(
            paths,
            options.index_dir,
            workers=options.workers,
            checksums=options.checksums,
            force=options.force,
            on_start=progress.start,
        )
    entries = update.entries.values()
    num_bytes, num_samples = sum(entry.num_bytes for entry in entries), sum(entry.num_samples for entry in entries)
    print(
        f"{update.num_indexed} of {counted(len(paths), 'shard')} indexed, {len(entries) - update.num_indexed} had an "
        f"index; {counted(num_samples, 'sample')}, {num_bytes / 1e9:,.2f} GB"
    )
    for manifest in update.manifests:
        print(f"wrote {manifest}")
    if update.errors:
        raise DataError("\n".join([f"{len(update.errors)} of {counted(len(paths), 'shard')} damaged:", *update.errors]))


def _index_remote(options: argparse.Namespace) -> None:
    """Index shards of object stores and web servers: where there is no index beside them, they are fetched."""
    from vlm_dist.data.storage.remote.shards import index_urls
    from vlm_dist.errors import ConfigError

    if options.index_dir is None:
        raise ConfigError("--index-dir is needed for URLs: data.index_dir of the run (runs/index by default)")
    manifest = index_urls(options.path, options.index_dir)
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    num_samples = counted(manifest.num_samples, "sample")
    print(f"{counted(len(manifest.shards), 'shard')} indexed; {num_samples}, {num_bytes / 1e9:,.2f} GB")
