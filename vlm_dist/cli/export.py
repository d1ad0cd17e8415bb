"""`vlm-dist export`: an adapter on its way out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_dist.cli.arguments import Commands

if TYPE_CHECKING:
    from vlm_dist.export.opening import Origin

_WHICH = ("final", "best", "latest")
_EPILOG = """\
  vlm-dist export verify runs/vqa
  vlm-dist export merge runs/vqa --which best -o merged/vqa
  vlm-dist export verify runs/vqa --which best --merged merged/vqa
"""


def add_commands(commands: Commands) -> None:
    """Add `export` with its commands."""
    parser = commands.add_parser(
        "export",
        help="merge an adapter into its base, or prove that it is what was trained",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inner = parser.add_subparsers(required=True, metavar="COMMAND")
    merge = inner.add_parser("merge", help="write base and adapter as one model, for transformers and vLLM")
    _add_adapter(merge)
    merge.add_argument("-o", dest="output", type=Path, required=True, metavar="DIR", help="a new directory")
    merge.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the weights (%(default)s)"
    )
    merge.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (%(default)s)")
    merge.set_defaults(command=run_merge)
    verify = inner.add_parser("verify", help="prove that an adapter loads everywhere and does what was trained")
    _add_adapter(verify)
    verify.add_argument("--merged", type=Path, default=None, metavar="DIR", help="also that this is the two as one")
    verify.add_argument("--json", action="store_true", help="one JSON object in the place of the table")
    verify.set_defaults(command=run_verify)


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter", type=Path, metavar="ADAPTER_DIR", help="a run's adapter/ or checkpoint-<step>/, or the run itself"
    )
    parser.add_argument("--which", choices=_WHICH, default=None, help="of a run's adapters (final)")
    parser.add_argument("--base", default=None, metavar="MODEL", help="where the base model is now")
    parser.add_argument("--run", type=Path, default=None, metavar="RUN.yaml", help="where it is not beside the adapter")


def _open(options: argparse.Namespace) -> Origin:
    from vlm_dist.export.opening import open_origin

    return open_origin(options.adapter, which=options.which, run_file=options.run, base=options.base)


def run_merge(options: argparse.Namespace) -> None:
    """Merge."""
    from vlm_dist.cli.messages import show_messages
    from vlm_dist.export.merge import merge

    show_messages()
    merge(_open(options), options.output, dtype=options.dtype, max_shard_size=options.max_shard_size, report=print)


def run_verify(options: argparse.Namespace) -> int:
    """Prove; gives back the exit code."""
    import json

    from vlm_dist.cli.messages import show_messages
    from vlm_dist.export.verify import verified
    from vlm_dist.observability.findings import Finding, Level, exit_code, format_table

    show_messages()
    origin = _open(options)
    found = verified(
        origin, options.merged, lambda error: Finding(Level.PROBLEM, "model", str(error), exit_code=error.exit_code)
    )
    code = exit_code(found)
    if options.json:
        records = [finding.as_record() for finding in found]
        print(json.dumps({"adapter": str(origin.path), "exit_code": int(code), "findings": records}, indent=2))
    else:
        print(format_table(found, f"vlm-dist export verify {origin.path}"))
    return int(code)
