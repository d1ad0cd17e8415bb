"""Runs of the trainers, seen from the bench: two ranks each, a deadline, peak memory, and the clocks' lines."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.bench.data.environments import ROOT, python_of
from tests.bench.training.job import Job
from tests.bench.training.trainers.ours import run_file
from vlm_dist.distributed.group import free_port

NUM_RANKS = 2
#: Steps before the first that counts: buffers are made, caches filled.
WARM_STEPS = 3


class RunError(Exception):
    """A trainer did not do what it was asked to."""


@dataclass(frozen=True)
class Run:
    """What came out of a run.

    Attributes:
        tokens_per_second: real tokens (context and target) of all ranks, over the steps after the first ones.
        step_seconds: of these steps, one by one, saves left out.
        tokens: of these steps, all together.
        import_seconds: from the start of the processes to the end of their imports.
        first_step_seconds: from there to the end of the first step.
        first_loss: mean of the ranks.
        save_seconds: what the step with the checkpoint took beyond the others.
        checkpoint_bytes: of the checkpoint.
        peak_mib: resident memory of all processes, shared pages counted once.
    """

    tokens_per_second: float
    step_seconds: tuple[float, ...]
    tokens: int
    import_seconds: float
    first_step_seconds: float
    first_loss: float
    save_seconds: float | None
    checkpoint_bytes: int | None
    peak_mib: float


def run_job(job: Job, deadline_seconds: float, log: Path) -> Run:
    """Train, and measure.

    Args:
        job: of the run; its output folder is emptied.
        deadline_seconds: a run that takes longer is ended.
        log: takes what the processes print.

    Raises:
        RunError: it failed, or took too long; the end of the log says why.
    """
    output = Path(job.output)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    path = output / "job.json"
    job.write(path)
    if job.trainer == "ours":
        run_file(job)
    command = [str(python_of(job.trainer)), "-m", "torch.distributed.run", "--nproc_per_node", str(NUM_RANKS)]
    command += ["--master_port", str(free_port()), "-m", f"tests.bench.training.trainers.{job.trainer}", str(path)]
    started = time.time()
    with log.open("w") as printed:
        process = subprocess.Popen(
            command, cwd=output, env=_environment(), stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        peak = _watch(process, started + deadline_seconds)
    finally:
        _end(process)
    if process.returncode:
        raise RunError(f"{job.trainer} {job.settings}: {_reason(process.returncode, log)}")
    return _read(job, started, peak)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "WANDB"))}
    own = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "USE_MODELSCOPE_HUB": "0",
        "DISABLE_VERSION_CHECK": "1",
    }
    return kept | own


def _watch(process: subprocess.Popen[bytes], deadline: float) -> float:
    """Wait for the end; gives the peak of the memory in MiB.

    Raises:
        RunError: the deadline is over.
    """
    peak = 0.0
    while process.poll() is None:
        if time.time() > deadline:
            raise RunError("took too long")
        total = 0
        with suppress(psutil.Error):
            for one in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    total += one.memory_full_info().pss
        peak = max(peak, total / 2**20)
        time.sleep(1.0)
    return peak


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the group is the run's own
    process.wait()


def _reason(code: int, log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and not line.startswith(("[rank", "torch.distributed"))]
    return f"exit code {code}: {(errors or lines or [''])[0].strip()[:300]}"


def _read(job: Job, started: float, peak: float) -> Run:
    clocks = [_lines(Path(job.output) / f"clock-{rank}.jsonl") for rank in range(NUM_RANKS)]
    main = clocks[0]
    steps = [line for line in main if line["event"] == "step"]
    if len(steps) < job.num_steps:
        raise RunError(f"{job.trainer} {job.settings}: {len(steps)} of {job.num_steps} steps were done")
    by_rank = [{line["step"]: line for line in clock if line["event"] == "step"} for clock in clocks]
    imported = max(line["time"] for clock in clocks for line in clock if line["event"] == "imported")
    numbers = [line["step"] for line in steps]
    times = {line["step"]: line["time"] for line in steps}
    # a checkpoint is written between the step that it is of and the next
    spans = {
        number: times[number] - times[before] for before, number in itertools.pairwise(numbers) if before >= WARM_STEPS
    }
    saved_in = job.save_at + 1 if job.save_at else None
    counted = {number: seconds for number, seconds in spans.items() if number != saved_in}
    tokens = sum(clock[number]["tokens"] for clock in by_rank for number in counted)
    median = statistics.median(counted.values())
    return Run(
        tokens_per_second=tokens / sum(counted.values()),
        step_seconds=tuple(counted.values()),
        tokens=tokens,
        import_seconds=imported - started,
        first_step_seconds=steps[0]["time"] - imported,
        first_loss=statistics.mean(clock[numbers[0]]["loss"] for clock in by_rank),
        save_seconds=None if saved_in not in spans else spans[saved_in] - median,
        checkpoint_bytes=_checkpoint_bytes(job) if job.save_at else None,
        peak_mib=peak,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise RunError(f"{path.name} is not there")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _checkpoint_bytes(job: Job) -> int | None:
    found = sorted((Path(job.output) / "run").rglob(f"checkpoint-{job.save_at}*"))
    if not found:
        return None
    return sum(file.stat().st_size for file in found[0].rglob("*") if file.is_file())
