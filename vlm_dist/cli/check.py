"""`vlm-dist check`: what can be known of a run before it trains."""

from __future__ import annotations

import argparse

from vlm_dist.cli.arguments import Commands, add_run

_STAGES = ("data", "processor", "batch", "model", "step")
_EPILOG = """\
Without --stage: data, processor, batch and model. --stage step loads the model and trains one step, which is not kept.
Ends with 0 where there is no problem, else with the exit code of the first stage that has one (docs/check.md).

  vlm-dist check configs/run.yaml --world-size 8
  vlm-dist check configs/run.yaml --stage data
"""


def add_commands(commands: Commands) -> None:
    """Add `check`."""
    check = commands.add_parser(
        "check",
        help="examine a run before it trains: every problem at once, each with its fix",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(check)
    check.add_argument(
        "--stage", dest="stages", action="append", choices=_STAGES, help="this stage alone; may be given several times"
    )
    check.add_argument("--world-size", type=int, default=1, help="ranks of the run (%(default)s)")
    check.add_argument("--json", action="store_true", help="one JSON object in the place of the table")
    check.set_defaults(command=run_check)


def run_check(options: argparse.Namespace) -> int:
    """Examine, and print what was found; gives back the exit code."""
    from vlm_dist.check.examination import DEFAULT_STAGES, examine

    found = examine(options.run, options.overrides, options.stages or DEFAULT_STAGES, options.world_size)
    print(found.to_json() if options.json else found)
    return int(found.exit_code)
