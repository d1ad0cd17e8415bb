"""`vlm-dist quarantine`: which samples a run could not use, and why."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from vlm_dist.cli.arguments import Commands
from vlm_dist.cli.messages import counted
from vlm_dist.errors import ConfigError


def add_commands(commands: Commands) -> None:
    """Add `quarantine`."""
    quarantine = commands.add_parser("quarantine", help="count the samples that a run could not use, and name some")
    quarantine.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="train.output_dir of the run")
    quarantine.add_argument("--json", action="store_true", help="one JSON line per sample, in place of the summary")
    quarantine.add_argument("--examples", type=int, default=3, metavar="N", help="named per class (%(default)s)")
    quarantine.set_defaults(command=show_quarantine)


def show_quarantine(options: argparse.Namespace) -> None:
    """Print the samples by class and by source, each sample once."""
    import json

    from vlm_dist.data.quarantine import read_quarantine

    if not options.output_dir.is_dir():
        raise ConfigError(f"{options.output_dir}: no such directory; give the output_dir of a run")
    samples: dict[tuple[str, ...], dict[str, Any]] = {}
    for record in read_quarantine(options.output_dir):
        identity = tuple(str(record[name]) for name in ("source", "shard", "key", "class"))
        seen = samples.setdefault(identity, {**record, "times": 0})
        seen["times"] += 1
    if options.json:
        for sample in samples.values():
            print(json.dumps(sample, ensure_ascii=False))
        return
    if not samples:
        print(f"{options.output_dir}: no sample was skipped")
        return
    for null_class in dict.fromkeys(sample["class"] for sample in samples.values()):
        chosen = [sample for sample in samples.values() if sample["class"] == null_class]
        by_source = Counter(sample["source"] for sample in chosen)
        counts = ", ".join(f"{source} {count}" for source, count in by_source.items())
        print(f"{null_class}: {counted(len(chosen), 'sample')} ({counts})")
        for sample in chosen[: options.examples]:
            place = f"{sample['source']}/{sample['shard']}:{sample['key']}"
            print(f"  {place}: {sample['message']} ({sample['purpose']} step {sample['step']})")
        if len(chosen) > options.examples > 0:
            print(f"  … and {len(chosen) - options.examples} more (--json names all)")
