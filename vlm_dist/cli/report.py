"""`vlm-dist report`: what runs did, as a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm_dist.cli.arguments import Commands

_PAGE = Path("report.html")


def add_commands(commands: Commands) -> None:
    """Add `report`."""
    parser = commands.add_parser(
        "report", help="show what runs did: curves, events, skipped samples, answers; several runs over each other"
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="train.output_dir of a run, ended or not")
    parser.add_argument("-o", dest="output", type=Path, default=None, metavar="PAGE.html", help=f"page ({_PAGE})")
    parser.add_argument(
        "--x", dest="axis", choices=("step", "time", "tokens"), default="step", help="axis of the curves (%(default)s)"
    )
    parser.add_argument("--no-pictures", action="store_true", help="leave out the pictures of samples")
    parser.add_argument("--terminal", action="store_true", help="print a short form here; writes a page only with -o")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.set_defaults(command=report)


def report(options: argparse.Namespace) -> None:
    """Read runs, and write a page or print them."""
    from vlm_dist.cli.messages import show_messages
    from vlm_dist.report.report import make_report

    show_messages()
    writes = options.output is not None or options.open or not options.terminal
    path = options.output if options.output is not None else _PAGE
    if writes:
        from vlm_dist.observability.page import check_place

        check_place(path)
    made = make_report(options.runs, with_pictures=writes and not options.no_pictures)
    if options.terminal:
        from vlm_dist.report.terminal import print_report

        print_report(made)
    if not writes:
        return
    from vlm_dist.report.html import write_page

    write_page(made, path, options.axis)
    print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB)")
    if options.open:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
