"""`vlm-dist report`: what runs did, as a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm_dist.cli.arguments import Commands
from vlm_dist.cli.pages import add_page, page_of, tell_page

_PAGE = Path("report.html")


def add_commands(commands: Commands) -> None:
    """Add `report`."""
    parser = commands.add_parser(
        "report", help="show what runs did: curves, events, skipped samples, answers; several runs over each other"
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="train.output_dir of a run, ended or not")
    parser.add_argument(
        "--x", dest="axis", choices=("step", "time", "tokens"), default="step", help="axis of the curves (%(default)s)"
    )
    parser.add_argument("--no-pictures", action="store_true", help="leave out the pictures of samples")
    add_page(parser, _PAGE)
    parser.set_defaults(command=report)


def report(options: argparse.Namespace) -> None:
    """Read runs, and write a page or print them."""
    from vlm_dist.cli.messages import show_messages
    from vlm_dist.report.report import make_report

    show_messages()
    path = page_of(options, _PAGE)
    made = make_report(options.runs, with_pictures=path is not None and not options.no_pictures)
    if options.terminal:
        from vlm_dist.report.terminal import print_report

        print_report(made)
    if path is None:
        return
    from vlm_dist.report.html import write_page

    write_page(made, path, options.axis)
    tell_page(path, opens=options.open)
