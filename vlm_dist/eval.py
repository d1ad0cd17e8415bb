"""Evaluate an adapter: `vlm-dist eval RUN.yaml`, or on several ranks as training runs.

deepspeed --num_gpus 8 -m vlm_dist.eval --config RUN.yaml --adapter runs/x/adapter
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm_dist.distributed.signals import StopRequest
from vlm_dist.entry import guarded, run, settle_environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is evaluated, besides the run file; `evaluate` reads it."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--adapter", type=Path, metavar="DIR", help="adapter (that of the run's end: output_dir/adapter)")
    what.add_argument("--checkpoint", metavar="DIR", help="adapter of a checkpoint: best, latest, or its directory")
    what.add_argument("--base", action="store_true", help="the base model, without any adapter")
    parser.add_argument(
        "--split", choices=["eval", "train"], default="eval", help="data.eval or data.train (%(default)s)"
    )
    parser.add_argument(
        "--metrics",
        metavar="A,B",
        help="metrics of generated answers (train.eval_metrics); loss alone generates no answers",
    )
    parser.add_argument("--max-samples", type=int, metavar="N", help="of each source (all)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PREDICTIONS.jsonl",
        help="file of the answers; the figures go beside it (a folder of its own in output_dir/eval)",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change a value of the run, such as train.per_device_eval_batch_size=4; may be given several times",
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line of `python -m vlm_dist.eval`."""
    parser = argparse.ArgumentParser(
        prog="python -m vlm_dist.eval",
        description="Loss and generated answers of an adapter on held-out samples.",
        epilog="Also: deepspeed --num_gpus 8 -m vlm_dist.eval --config RUN.yaml; vlm-dist eval RUN.yaml",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="RUN.yaml", help="run file")
    add_arguments(parser)
    # DeepSpeed's launcher hands every process its local rank; the environment has it too.
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def evaluate(config: Path, options: argparse.Namespace, stop: StopRequest) -> int:
    """Evaluate as the options of `add_arguments` say; gives back the exit code."""
    from vlm_dist.config import load_run

    loaded = load_run(config, options.overrides)
    settle_environment()
    # torch, transformers and DeepSpeed come in here, when the config is known to be good
    from vlm_dist.build.standalone import EvalRequest, evaluate_once

    request = EvalRequest(
        adapter=options.adapter,
        checkpoint=options.checkpoint,
        is_base=options.base,
        split=options.split,
        metrics=None if options.metrics is None else tuple(filter(None, options.metrics.split(","))),
        max_samples=options.max_samples,
        output=options.output,
    )
    return int(evaluate_once(loaded, request, stop))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; gives back the exit code (see `vlm_dist.errors.ExitCode`)."""
    options = parse_arguments(arguments)
    return guarded(lambda stop: evaluate(options.config, options, stop))


if __name__ == "__main__":
    run(main)
