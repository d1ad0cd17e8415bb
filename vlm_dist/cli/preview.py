"""`vlm-dist preview`: samples as the model will see them."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm_dist.cli.arguments import Commands, add_run
from vlm_dist.cli.pages import add_page, page_of, tell_page

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
    add_page(parser, _PAGE)
    parser.set_defaults(command=preview)


def preview(options: argparse.Namespace) -> None:
    """Look at a run's data, and write a page or print it."""
    from vlm_dist.cli.messages import show_messages
    from vlm_dist.preview.preview import make_preview

    show_messages()
    path = page_of(options, _PAGE)
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
    if path is None:
        return
    from vlm_dist.preview.html import write_page

    write_page(made, path)
    tell_page(path, opens=options.open)
