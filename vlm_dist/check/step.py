"""The stage of the step: one real optimizer step of this run, on this machine, in a directory that is removed."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_dist.check.parts import Parts
from vlm_dist.config import RunConfig
from vlm_dist.errors import ExitCode
from vlm_dist.observability.findings import Finding, Level
from vlm_dist.observability.jsonl import METRICS_FILE, read_metrics

#: Lines of the trainer's own words that are shown where it fails.
_NUM_LINES = 12


def check_step(parts: Parts) -> Iterator[Finding]:
    """Train one step as the trainer does, with the run's model, data and DeepSpeed; then see what has moved."""
    config = parts.config("model", "collator", "data", "train", "peft", "deepspeed")
    with tempfile.TemporaryDirectory(prefix="vlm-dist-check-") as temporary:
        output_dir = Path(temporary) / "run"
        ended = _train(config, Path(temporary), output_dir)
        if ended.returncode != 0:
            yield _failure(ended)
            return
        yield from _figures(output_dir)
        yield from _moved(output_dir)


def _train(config: RunConfig, directory: Path, output_dir: Path) -> subprocess.CompletedProcess[str]:
    """One step in a process of its own: memory that runs out takes that process, not this one."""
    train = config.train.model_copy(
        update={
            "output_dir": output_dir,
            "stop_at_step": 1,
            "resume": False,
            "eval_on_start": False,
            "logging_steps": 1,
            "eval_steps": 0,
            "save_steps": 0,
            "report_to": (),
            "sample_ledger": False,
            "dataloader_num_workers": min(config.train.dataloader_num_workers, 1),
            # from the first step on something is to be learned, so that it can be seen
            "warmup_ratio": 0.0,
            "warmup_steps": 0,
        }
    )
    resolved = directory / "check.yaml"
    config.model_copy(update={"train": train}).write(resolved)
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    return subprocess.run(  # noqa: S603 - our own interpreter, no shell
        [sys.executable, "-m", "vlm_dist.train", "--config", str(resolved)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _failure(ended: subprocess.CompletedProcess[str]) -> Finding:
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    told = next((number for number, line in enumerate(lines) if line.startswith("error: ")), None)
    said = lines[told:] if told is not None else lines[-_NUM_LINES:]
    if ended.returncode < 0:
        name = signal.Signals(-ended.returncode).name
        found = f"the process was ended by {name}"
        fix = "the memory of this machine may not be enough: `vlm-dist estimate`" if name == "SIGKILL" else ""
        return Finding(Level.PROBLEM, "step", "\n".join([found, *said[-_NUM_LINES:]]), fix)
    code = ExitCode(ended.returncode) if ended.returncode in {*ExitCode} else ExitCode.FAILURE
    return Finding(Level.PROBLEM, "step", "\n".join(said).removeprefix("error: "), exit_code=code)


def _figures(output_dir: Path) -> Iterator[Finding]:
    record: dict[str, Any] = next(iter(read_metrics(output_dir / METRICS_FILE, "train")), {})
    loss, norm = record.get("loss"), record.get("grad_norm")
    figures = f"loss {_told(loss)}, gradient norm {_told(norm)}"
    if loss is None or norm is None or not math.isfinite(loss) or not math.isfinite(norm):
        yield Finding(
            Level.PROBLEM,
            "step",
            f"{figures}: not finite",
            "docs/faults.md, non-finite steps: a lower learning rate, bf16 in the place of fp16, or a damaged base",
            exit_code=ExitCode.DIVERGED,
        )
        return
    seconds = record.get("step_seconds")
    took = f", {seconds:.1f} s" if isinstance(seconds, float) else ""
    yield Finding(Level.OK, "step", f"{figures}{took}; undone: nothing of it is kept")


def _told(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _moved(output_dir: Path) -> Iterator[Finding]:
    """Whether everything that is trained has had a gradient: by Adam's first moment, which is 0 without one."""
    from safetensors import safe_open

    found = sorted(output_dir.glob("checkpoint-*/training_state.safetensors"))
    if not found:  # every rank has written its own share
        yield Finding(Level.NOTICE, "gradients", "not looked at: the state of this run is written in slices")
        return
    still, moved = [], 0
    with safe_open(found[-1], framework="pt") as state:
        names = [name for name in state.keys() if "exp_avg" in name and "exp_avg_sq" not in name]  # noqa: SIM118
        for name in names:
            if bool(state.get_tensor(name).any()):
                moved += 1
            elif ".lora_A." not in name:  # those have no gradient while their B is 0
                still.append(name)
    if still:
        yield Finding(
            Level.WARNING,
            "gradients",
            f"{len(still)} of {moved + len(still)} trained tensors had no gradient in this step",
            "harmless where the step had no picture or clip for a tower; otherwise freeze what cannot learn",
            details="\n".join(still),
        )
    else:
        yield Finding(Level.OK, "gradients", f"all {moved:,} tensors that could have one had a gradient")
