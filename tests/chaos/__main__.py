"""The fault campaign: `python -m tests.chaos --seed 7`. Exit status 1 if a fault was not survived."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path


def main() -> int:
    """Run it, print a line per fault, and write the page of a full campaign."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=7, help="of the steps, ranks and moments (%(default)s)")
    parser.add_argument("--only", default=None, help="regular expression of kinds")
    parser.add_argument("--short", action="store_true", help="one fault of a few kinds")
    parser.add_argument("--most", type=int, default=None, help="so many of each kind")
    parser.add_argument("--plain", action="store_true", help="none through the deepspeed command")
    parser.add_argument("--list", action="store_true", help="name the faults, and do nothing")
    parser.add_argument("--keep", type=Path, default=None, help="work here, and leave it")
    options = parser.parse_args()
    from tests.chaos import faults as table
    from tests.chaos import page, runs

    if not options.list:
        runs.preload()
    from tests.chaos.campaign import Campaign, run_all

    wanted = page.short(options.seed) if options.short else table.make_faults(options.seed, options.only)
    if os.geteuid() != 0:
        left_out = [fault for fault in wanted if fault.needs_root]
        wanted = [fault for fault in wanted if not fault.needs_root]
        print(f"{len(left_out)} faults need root and are left out", file=sys.stderr)
    if options.plain:
        wanted = [fault for fault in wanted if not fault.layout.command_line]
    if options.most is not None:
        wanted = [fault for fault in wanted if int(fault.name.rpartition("-")[2]) < options.most]
    if options.list:
        for fault in wanted:
            print(f"{fault.kind}: {fault.what} ({fault.layout})")
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as temporary:
        directory = options.keep or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        campaign = Campaign(directory)
        campaign.reference("plain", table.TWO)  # nothing below makes sense without it
        if options.only is None or re.search(options.only, "kill in a save"):
            rng = random.Random(f"{options.seed}/kill in a save")
            wanted += campaign.kills_in_save(rng, most=2 if options.short else options.most)
        rows = run_all(campaign, wanted, lambda row: print(json.dumps(row.line), flush=True))
        for fault in wanted:
            table.remove(campaign.run.directory / fault.name)
    met = [row.line["name"] for row in rows if row.survived]
    missed = [row.line["name"] for row in rows if not row.survived]
    print(json.dumps({"summary": {"met": met, "missed": missed}}), flush=True)
    if not (options.short or options.only or options.most or options.plain):
        page.write(rows, options.seed, time.monotonic() - began)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
