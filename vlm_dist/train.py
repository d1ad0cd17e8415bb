"""Train: `python -m vlm_dist.train`, `deepspeed -m vlm_dist.train`, or one task per GPU under srun.

python -m vlm_dist.train --config configs/run.yaml --set train.learning_rate=1e-4
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm_dist.distributed.signals import StopRequest
from vlm_dist.entry import guarded, run, settle_environment

DEFAULT_CONFIG = Path("configs/run.yaml")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vlm_dist.train",
        description="Fine-tune a vision-language model with LoRA, as a run file says.",
        epilog="Also: deepspeed --num_gpus 8 -m vlm_dist.train --config RUN.yaml; sbatch slurm/train.sbatch",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=Path, default=DEFAULT_CONFIG, metavar="RUN.yaml", help="run file (%(default)s)"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change a value, such as train.learning_rate=1e-4; may be given several times",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="trace some steps into output_dir/profile, as train.profile says (by default 3 steps after 10)",
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        help="two steps in this process, beside output_dir: no workers or services, anomalies found, first batch shown",
    )
    # DeepSpeed's launcher hands every process its local rank; the environment has it too.
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.profile:
        options.overrides.append("train.profile={}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command; gives back the exit code (see `vlm_dist.errors.ExitCode`)."""
    options = parse_arguments(arguments)

    def work(stop: StopRequest) -> int:
        from vlm_dist.config import load_run

        config = load_run(options.config, options.overrides)
        settle_environment()
        if options.debug:
            from vlm_dist.debug import debug

            return int(debug(config, stop))
        # torch, transformers and DeepSpeed come in here, when the config is known to be good
        from vlm_dist.build import train

        return int(train(config, stop))

    return guarded(work)


if __name__ == "__main__":
    run(main)
