"""`--debug`: two steps of a run in this process, slowly and in plain sight, beside its directory and not in it."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from pathlib import Path

from vlm_dist.check.batch import tensor_table
from vlm_dist.config import RunConfig
from vlm_dist.distributed.environment import resolve_topology
from vlm_dist.distributed.signals import StopRequest
from vlm_dist.errors import ConfigError, ExitCode, VlmDistError
from vlm_dist.preview.choosing import Chosen
from vlm_dist.preview.opening import open_run
from vlm_dist.preview.samples import SampleView, view_samples

NUM_STEPS = 2
#: Held-out samples of each source, and tokens of an answer.
NUM_EVAL_SAMPLES = 4
NUM_NEW_TOKENS = 8

#: Beside the run's own directory; what lies there is of an earlier `--debug`, as this file says, and is removed.
_SUFFIX = "-debug"
_MARK = ".vlm-dist-debug"
_WIDTH = 120


def debug(config: RunConfig, stop: StopRequest) -> ExitCode:
    """Show the first micro-batch in files, then train two steps on the way that a debugger can follow.

    One process, data made in it, torch's anomaly detection on, nothing sent to any service. Learning rate and schedule
    are those of the run.

    Args:
        config: of the run.
        stop: listens to the signals of this process.

    Raises:
        ConfigError: there are several ranks, or the directory is somebody else's.
        VlmDistError: as in training; its traceback has been printed.
    """
    topology = resolve_topology(os.environ)
    if topology.world_size > 1:
        raise ConfigError(
            f"--debug is for one process, and there are {topology.world_size}: python -m vlm_dist.train --debug"
        )
    config = debug_config(config)
    directory = _own_directory(config.train.output_dir)
    resolved = directory / "debug.yaml"
    config.write(resolved)
    try:
        _say(f"debug: everything goes to {directory}; the run's own directory is not touched")
        _say(f"debug: the first micro-batch is in {show_first_batch(resolved, directory)}")
        code = _train(config, stop)
    except VlmDistError:
        traceback.print_exc()
        raise
    if code is ExitCode.DONE:
        _say(f"debug: it went through; all of it is in {directory}. To train, leave out --debug")
    return code


def debug_config(config: RunConfig) -> RunConfig:
    """The same run, small enough to look at."""
    train = config.train.model_copy(
        update={
            "output_dir": config.train.output_dir.with_name(config.train.output_dir.name + _SUFFIX),
            "stop_at_step": NUM_STEPS,
            "resume": False,
            "logging_steps": 1,
            "save_steps": 0,
            "eval_steps": NUM_STEPS if config.data.eval else 0,
            "eval_on_start": False,
            "generation_max_new_tokens": min(config.train.generation_max_new_tokens, NUM_NEW_TOKENS),
            "report_to": (),
            "dataloader_num_workers": 0,
            "dataloader_prefetch_factor": 1,
            "torch_compile": False,
            "memory_check": False,
            "sample_ledger": True,
        }
    )
    held_out = tuple(
        source.model_copy(update={"max_samples": min(source.max_samples or NUM_EVAL_SAMPLES, NUM_EVAL_SAMPLES)})
        for source in config.data.eval
    )
    data = config.data.model_copy(update={"eval": held_out})
    return config.model_copy(update={"train": train, "data": data})


def _own_directory(directory: Path) -> Path:
    """An empty directory of this command's."""
    if directory.exists():
        if not (directory / _MARK).exists():
            raise ConfigError(f"--debug writes to {directory}, which something else has made; move it away")
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    (directory / _MARK).touch()
    return directory


def _train(config: RunConfig, stop: StopRequest) -> ExitCode:
    import torch

    from vlm_dist.build import train

    with torch.autograd.set_detect_anomaly(True):
        return train(config, stop)


def show_first_batch(run_file: Path, directory: Path) -> Path:
    """Write the first micro-batch as a person reads it: tokens, which of them carry loss, tensors, pictures.

    Args:
        run_file: of the run.
        directory: where to.

    Returns:
        The text; pictures lie in a directory of its name.
    """
    from rich.console import Console

    from vlm_dist.preview.terminal import describe_sample

    run = open_run(run_file)
    (job, *_) = run.plan.step(0).for_rank(0, 1)
    chosen = [Chosen(job, slot) for slot, ref in enumerate(job.refs) if ref is not None]
    samples = view_samples(run, chosen, num_workers=0)
    path = directory / "first_batch.txt"
    with path.open("w", encoding="utf-8") as file:
        out = Console(file=file, width=_WIDTH, no_color=True, highlight=False, markup=False)
        out.print(tensor_table(run.materialise["train"](job)), soft_wrap=True)
        for view in samples.views:
            out.print()
            for line in describe_sample(view, has_colours=False):
                out.print(line)
            _write_pictures(view, directory / path.stem)
    return path


def _write_pictures(view: SampleView, directory: Path) -> None:
    for medium in view.media:
        directory.mkdir(exist_ok=True)
        for number, shot in enumerate(medium.shots, start=1):
            ending = shot.mime.rpartition("/")[2]
            frame = f"-frame-{number}" if medium.kind == "video" else ""
            name = f"sample-{view.number}-{medium.kind}-{medium.number}{frame}.{ending}"
            (directory / name).write_bytes(shot.data)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - the log is not open yet
