"""Train: `python -m vlm_dist.train`, `deepspeed -m vlm_dist.train`, or one task per GPU under srun.

python -m vlm_dist.train --config configs/run.yaml --set train.learning_rate=1e-4
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from vlm_dist.distributed.signals import AT_ONCE, StopRequest
from vlm_dist.errors import ExitCode, VlmDistError

DEFAULT_CONFIG = Path("configs/run.yaml")

#: How long a rank other than 0 keeps quiet with an error, so that rank 0 tells it first.
QUIET_SECONDS = 10


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
    # DeepSpeed's launcher hands every process its local rank; the environment has it too.
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; gives back the exit code (see `vlm_dist.errors.ExitCode`)."""
    options = parse_arguments(arguments)
    stop = StopRequest()
    stop.install()  # before the imports, which take seconds
    try:
        from vlm_dist.config import load_run

        config = load_run(options.config, options.overrides)
        settle_environment()
        # torch, transformers and DeepSpeed come in here, when the config is known to be good
        from vlm_dist.build import train

        return int(train(config, stop))
    except VlmDistError as error:
        tell(error, is_ended=stop.signal is signal.SIGTERM)
        return int(error.exit_code)
    except KeyboardInterrupt:
        print(AT_ONCE, file=sys.stderr, flush=True)  # noqa: T201
        return 128 + signal.SIGINT


def settle_environment() -> None:
    """Set what the launcher has left open; before torch is imported, which reads some of it then."""
    from vlm_dist.distributed.environment import resolve_topology
    from vlm_dist.distributed.process_settings import settle

    topology = resolve_topology(os.environ)
    for line in settle(os.environ, topology):
        if topology.local_rank == 0:
            print(f"notice: {line}", file=sys.stderr, flush=True)  # noqa: T201


def tell(error: VlmDistError, *, is_ended: bool = False) -> None:
    """Print an error once for all ranks that share it.

    A launcher that loses a rank ends the others. So rank 0 speaks, and another rank speaks only if it has not been
    ended by then: the error was its own.

    Args:
        error: what to tell.
        is_ended: this process has had SIGTERM already.
    """
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank == "0" or not rank.isdigit():  # not a number: that is what the error is about
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if not is_ended and signal.sigtimedwait({signal.SIGTERM}, QUIET_SECONDS) is None:
        print(f"error (rank {rank}): {error}", file=sys.stderr, flush=True)  # noqa: T201


def run() -> NoReturn:
    """Be the command: whatever escapes is printed, and the process ends with its exit code."""
    try:
        code = main()
    except Exception:
        if not _is_alone():
            raise  # a debugger shows where
        traceback.print_exc()
        code = int(ExitCode.FAILURE)
    leave(code)


def _is_alone() -> bool:
    """Whether nothing is on the stack but `python -m`: no debugger, no profiler."""
    frame = sys._getframe()
    while frame.f_code.co_filename in (__file__, "<frozen runpy>"):
        if frame.f_back is None:
            return True
        frame = frame.f_back
    return False


def leave(code: int) -> NoReturn:
    """End the process with this exit code, whatever threads torch has left behind.

    Taking the interpreter apart would kill a thread of gloo that asks for the GIL meanwhile, and with it, now and then,
    the process: "terminate called without an active exception", and SIGABRT in the place of our exit code.
    """
    if not _is_alone():
        sys.exit(code)  # a debugger or a profiler has the last word
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
