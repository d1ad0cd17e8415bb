"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

#: What `argparse.ArgumentParser.add_subparsers` gives.
Commands = Any


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the run file and what overrides it."""
    parser.add_argument("run", type=Path, metavar="RUN.yaml", help="run file")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
