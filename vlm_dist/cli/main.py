"""`vlm-dist`: what one wants to know and to do before and after training.

Imports are inside the commands, so that the help comes at once. Every module of this package has `add_commands`.
"""

from __future__ import annotations

import argparse
import sys

from vlm_dist.cli import (
    check,
    config,
    doctor,
    estimate,
    export,
    generate,
    init,
    launch,
    plan,
    preview,
    quarantine,
    report,
    shards,
)
from vlm_dist.cli import eval as evaluation
from vlm_dist.cli.help import TeachingParser, add_examples
from vlm_dist.errors import ExitCode, VlmDistError


def main(arguments: list[str] | None = None) -> int:
    """Run a command; gives back the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code = options.command(options)  # most give back nothing
    except VlmDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except BrokenPipeError:  # `vlm-dist … | head`
        sys.stderr.close()
        code = None
    return int(ExitCode.DONE if code is None else code)


def _parser() -> argparse.ArgumentParser:
    parser = TeachingParser(prog="vlm-dist")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser)
    parser.commands = commands
    for module in (
        init,
        config,
        check,
        preview,
        estimate,
        report,
        evaluation,
        generate,
        export,
        plan,
        shards,
        quarantine,
        launch,
        doctor,
    ):
        module.add_commands(commands)
    add_examples(commands)
    return parser
