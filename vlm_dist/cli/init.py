"""`vlm-dist init`: a run file of one's own, by answering questions or from flags."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from vlm_dist.cli.arguments import Commands
from vlm_dist.errors import ConfigError

_EPILOG = """\
  vlm-dist init                                               asks, with what it finds in the data as answers
  vlm-dist init configs/vqa.yaml --model Qwen/Qwen2-VL-2B-Instruct --data data/vqa.jsonl --answer-column response --yes
"""


def add_commands(commands: Commands) -> None:
    """Add `init`."""
    init = commands.add_parser(
        "init",
        help="write a run file for your model and data, by asking or from flags",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    init.add_argument(
        "file", type=Path, nargs="?", default=Path("configs/my_run.yaml"), metavar="RUN.yaml", help="(%(default)s)"
    )
    init.add_argument("--model", help="hub id or local directory")
    init.add_argument("--data", help="directory or glob of tar shards, a .jsonl file, or the name of a data set")
    init.add_argument("--eval-data", help="the same, held out")
    init.add_argument("--media-root", help="where relative paths of pictures and clips start")
    for kind in ("image", "video", "question", "answer", "messages"):
        init.add_argument(
            f"--{kind}-column", metavar="NAME", help=f"column of the {kind}; found by its name if left out"
        )
    init.add_argument("--gpus", type=int, help="on one node; more than 8 are several nodes of 8")
    init.add_argument("--output-dir", type=Path, help="of the run")
    init.add_argument("--yes", action="store_true", help="ask nothing")
    init.add_argument("--force", action="store_true", help="replace the file if it is there")
    init.set_defaults(command=run_init)


def run_init(options: argparse.Namespace) -> None:
    """Ask what is missing, and write the file."""
    from vlm_dist.start.answers import Answers, complete
    from vlm_dist.start.run_file import write_run_file

    if options.file.exists() and not options.force:
        raise ConfigError(f"{options.file} is there already; name another file, or --force")
    given = Answers(
        model=options.model,
        data=options.data,
        eval_data=options.eval_data,
        media_root=options.media_root,
        columns={
            kind: name
            for kind in ("image", "video", "question", "answer", "messages")
            if (name := getattr(options, f"{kind}_column")) is not None
        },
        num_gpus=options.gpus,
        output_dir=options.output_dir,
    )
    asks = not options.yes and sys.stdin.isatty()
    if not asks and (options.model is None or options.data is None):
        raise ConfigError("name a --model and --data (there is no terminal to ask on, or --yes was given)")
    answers = complete(given, asks=asks)
    command = write_run_file(options.file, answers)
    print(f"wrote {options.file}")
    file = shlex.quote(str(options.file))
    print(f"next:  vlm-dist check {file}\n       vlm-dist preview {file}\n       {command}")
