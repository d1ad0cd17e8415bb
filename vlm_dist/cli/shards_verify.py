"""`vlm-dist shards verify`: reads all content and reports what is wrong."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vlm_dist.cli.arguments import Commands
from vlm_dist.cli.messages import counted
from vlm_dist.cli.shards_index import add_shard_paths, find_shards


def add_commands(commands: Commands) -> None:
    """Add `verify`."""
    parser = commands.add_parser(
        "verify",
        help="read all content of shards and report what is damaged or has changed",
        description="Checks the structure of every tar, that its index fits it, the content where there are checksums "
        "(`shards build` makes them, and `shards index --checksums`), and with --decode every image and video. Prints "
        "a JSON line per finding; the exit code is 3 if there are any.",
    )
    add_shard_paths(parser)
    parser.add_argument("--decode", action="store_true", help="also decode every image and some frames of every video")
    parser.add_argument("--workers", type=int, default=None, metavar="N", help="processes (as many as there are cores)")
    parser.add_argument("--report", type=Path, default=None, metavar="FILE", help="write the JSON lines there instead")
    parser.set_defaults(command=verify)


def verify(options: argparse.Namespace) -> None:
    """Verify shards; prints JSON lines, and fails if anything is wrong."""
    from vlm_dist.cli.messages import show_messages
    from vlm_dist.data.index.parallel import default_workers
    from vlm_dist.data.index.progress import ShardProgress
    from vlm_dist.data.shards.verify import Finding, ShardRead
    from vlm_dist.data.shards.verify_workers import verify_shards
    from vlm_dist.errors import ConfigError, DataError

    show_messages()
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: expected 1 or more")
    paths = find_shards(options.path)
    done: list[ShardRead] = []
    found: list[Finding] = []
    try:
        report = sys.stdout if options.report is None else options.report.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--report {options.report}: cannot be written: {error.strerror}") from error

    def on_finding(finding: Finding) -> None:
        found.append(finding)
        print(json.dumps(finding.as_json(), ensure_ascii=False), file=report, flush=True)

    def on_shard(shard: ShardRead) -> None:
        done.append(shard)
        progress.advance()

    try:
        with ShardProgress("verifying", len(paths)) as progress:
            verify_shards(
                paths,
                options.index_dir,
                workers=min(len(paths), options.workers or default_workers()),
                decode=options.decode,
                on_finding=on_finding,
                on_shard=on_shard,
            )
    finally:
        if options.report is not None:
            report.close()
    print(
        f"read {counted(len(done), 'shard')}, {counted(sum(shard.num_samples for shard in done), 'sample')}, "
        f"{sum(shard.num_bytes for shard in done) / 1e9:,.2f} GB; {sum(shard.has_index for shard in done):,} have an "
        f"index, {sum(shard.has_checksums for shard in done):,} checksums",
        file=sys.stderr,
    )
    if found:
        where = "above" if options.report is None else f"in {options.report}"
        shards = counted(len({finding.shard for finding in found}), "shard")
        raise DataError(f"{counted(len(found), 'finding')} in {shards}, listed {where}")
