"""Runs of the trainers, seen from the bench: two ranks each, a deadline, peak memory, and the clocks' lines."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from tests.bench.data.environments import ROOT, python_of
from tests.bench.training.job import Job
from tests.bench.training.trainers.ours import run_file
from vlm_dist.distributed.group import free_port

OURS = "ours"
NUM_RANKS = 2
#: Steps before the first that counts: buffers are made, caches filled.
WARM_STEPS = 3
_RAISED = re.compile(r"(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception): .+)")


class RunError(Exception):
    """A trainer did not do what it was asked to."""


class TooLongError(RunError):
    """A trainer was ended at its deadline.

    Args:
        started: when its processes were.
        seconds: that it was given.
    """

    def __init__(self, started: float, seconds: float) -> None:
        super().__init__(f"took over {seconds:.0f} s")
        self.started = started


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
        save_seconds: how long training stood still for the checkpoint.
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
    started, peak = _train(job, deadline_seconds, log)
    return _read(job, started, peak)


@dataclass(frozen=True)
class Resumed:
    """How long it takes to go on.

    Attributes:
        import_seconds: from the start of the processes to the end of their imports.
        first_step_seconds: from there to the end of the first step.
        is_over: there was none: it took more than that.
    """

    import_seconds: float
    first_step_seconds: float
    is_over: bool = False


def resume_job(job: Job, at: int, deadline_seconds: float, log: Path) -> Resumed:
    """Leave a checkpoint that says `at` steps are done, and go on from it.

    Args:
        job: of the run; its output folder is emptied.
        at: steps that the checkpoint is to have.
        deadline_seconds: of each of the two runs.
        log: takes what the processes print.

    Raises:
        RunError: one of the two failed, or the first took too long.
    """
    try:
        _train(replace(job, num_steps=1, save_at=1, pretended=at), deadline_seconds, log)
    except RunError as error:
        raise RunError(f"the first start: {error}") from error
    if job.trainer != OURS:
        _pretend(Path(job.output), at)
    again = replace(job, num_steps=at + 1, save_at=0, resumed_at=at)
    is_over = False
    try:
        started, _ = _train(again, deadline_seconds, log)
    except TooLongError as error:
        started, is_over = error.started, True
    clocks = [_lines(Path(job.output) / f"clock-{rank}.jsonl") for rank in range(NUM_RANKS)]
    first = [next((line for line in clock if line["event"] == "step"), None) for clock in clocks]
    imported = max(line["time"] for clock in clocks for line in clock if line["event"] == "imported")
    if is_over:
        return Resumed(imported - started, started + deadline_seconds - imported, is_over=True)
    if any(line is None or line["step"] != at + 1 for line in first):
        raise RunError(f"{job.trainer} {job.settings}: the first step was not {at + 1}, but {first}")
    return Resumed(imported - started, max(line["time"] for line in first if line) - imported)


def _pretend(output: Path, at: int) -> None:
    """Have a checkpoint of Hugging Face's Trainer say that it is of a later step."""
    folder = next((output / "run").rglob("checkpoint-1"))
    path = folder / "trainer_state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(state | {"global_step": at, "epoch": state["epoch"] * at}), encoding="utf-8")
    folder.rename(folder.with_name(f"checkpoint-{at}"))


def _train(job: Job, deadline_seconds: float, log: Path) -> tuple[float, float]:
    """Gives the time of its start, and the peak of memory in MiB."""
    output = Path(job.output)
    if job.resumed_at:
        for clock in output.glob("clock-*.jsonl"):
            clock.unlink()
    else:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
    path = output / "job.json"
    job.write(path)
    if job.trainer == OURS:
        run_file(job)
    command = [str(python_of(job.trainer)), "-m", "torch.distributed.run", "--nproc_per_node", str(NUM_RANKS)]
    command += ["--master_port", str(free_port()), "-m", f"tests.bench.training.trainers.{job.trainer}", str(path)]
    started = time.time()
    with log.open("w") as printed:
        process = subprocess.Popen(
            command, cwd=output, env=_environment(), stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        peak = _watch(process, started, started + deadline_seconds)
    finally:
        _end(process)
    if process.returncode:
        raise RunError(f"{job.trainer} {job.settings}: {_reason(process.returncode, log)}")
    return started, peak


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "WANDB"))}
    own = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(ROOT / ".bench" / "cache"),
        "PYTHONWARNINGS": "ignore",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "USE_MODELSCOPE_HUB": "0",
        "DISABLE_VERSION_CHECK": "1",
    }
    return kept | own


def _watch(process: subprocess.Popen[bytes], started: float, deadline: float) -> float:
    """Wait for the end; gives the peak of the memory in MiB.

    Raises:
        TooLongError: the deadline is over.
    """
    peak = 0.0
    while process.poll() is None:
        if time.time() > deadline:
            raise TooLongError(started, deadline - started)
        total = 0
        with suppress(psutil.Error):
            for one in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    total += one.memory_full_info().pss
        peak = max(peak, total / 2**20)
        time.sleep(1.0)
    return peak


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(psutil.Error):  # torchrun's ranks have groups of their own
        for one in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                one.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the group is the run's own
    process.wait()


def _reason(code: int, log: Path) -> str:
    """What a person would look for: our own message, what a rank raised, or else the first line with an error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error: ")]
    raised = [found[1] for line in lines if (found := _RAISED.match(line)) and "ChildFailed" not in line]
    errors = told or raised or [line for line in lines if "Error" in line and not line.startswith("torch.distr")]
    return f"exit code {code}: {(errors or lines or [''])[0][:300]}"


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
    saved = next((line["time"] for line in main if line["event"] == "saved" and line["step"] == job.save_at), None)
    return Run(
        tokens_per_second=tokens / sum(counted.values()),
        step_seconds=tuple(counted.values()),
        tokens=tokens,
        import_seconds=imported - started,
        first_step_seconds=steps[0]["time"] - imported,
        first_loss=statistics.mean(clock[numbers[0]]["loss"] for clock in by_rank),
        save_seconds=None if saved is None else saved - times[job.save_at],
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
