"""`vlm-dist preview`: samples as the model will see them."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm_dist.cli.arguments import Commands, add_run

_PAGE = Path("preview.html")


def add_commands(commands: Commands) -> None:
    """Add `preview`."""
    parser = commands.add_parser(
        "preview", help="show samples as the model will see them: pictures, prompt, labels, lengths, padding"
    )
    add_run(parser)
    parser.add_argument("-n", dest="count", type=int, default=12, metavar="N", help="samples to show (%(default)s)")
    parser.add_argument("--eval", action="store_true", help="held-out samples instead of training samples")
    parser.add_argument("--step", type=int, default=None, help="the first step that is looked at, from 0 (0)")
    parser.add_argument("--seed", type=int, default=None, help="draw samples from all steps instead")
    parser.add_argument("--world-size", type=int, default=1, help="ranks of the run (%(default)s)")
    parser.add_argument("-o", dest="output", type=Path, default=None, metavar="PAGE.html", help=f"page ({_PAGE})")
    parser.add_argument("--terminal", action="store_true", help="print it here; writes a page only with -o")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.set_defaults(command=preview)


def preview(options: argparse.Namespace) -> None:
    """Look at a run's data, and write a page or print it."""
    from vlm_dist.cli.messages import show_messages
    from vlm_dist.preview.preview import make_preview

    show_messages()
    path = options.output if options.output is not None else _PAGE
    writes = options.output is not None or options.open or not options.terminal
    if writes:
        from vlm_dist.observability.page import check_place

        check_place(path)
    made = make_preview(
        options.run,
        options.overrides,
        count=options.count,
        step=options.step,
        seed=options.seed,
        held_out=options.eval,
        world_size=options.world_size,
    )
    if options.terminal:
        from vlm_dist.preview.terminal import print_preview

        print_preview(made)
    if not writes:
        return
    from vlm_dist.preview.html import write_page

    write_page(made, path)
    print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB)")
    if options.open:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
