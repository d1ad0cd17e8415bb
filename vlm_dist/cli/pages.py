"""What the commands share that write a page."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_page(parser: argparse.ArgumentParser, default: Path) -> None:
    """Add where the page goes; `page_of` reads it."""
    parser.add_argument("-o", dest="output", type=Path, default=None, metavar="PAGE.html", help=f"page ({default})")
    parser.add_argument("--terminal", action="store_true", help="print it here; writes a page only with -o")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def page_of(options: argparse.Namespace, default: Path) -> Path | None:
    """Where the page goes; None: it is printed alone.

    Raises:
        ConfigError: no page can be there.
    """
    if options.terminal and options.output is None and not options.open:
        return None
    from vlm_dist.observability.page import check_place

    path: Path = options.output if options.output is not None else default
    check_place(path)
    return path


def tell_page(path: Path, *, opens: bool) -> None:
    """Say that it is written, and open it if that is wanted."""
    print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB)")
    if opens:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
