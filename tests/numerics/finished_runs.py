"""What two finished runs are compared by: every step's figures, and every bit of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny_run import Finished, TinyRun

#: Figures of a step that follow from the plan and the weights alone; the others tell time and memory.
EXACT_FIGURES = ("loss", "grad_norm", "learning_rate", "epoch", "num_target_tokens", "null_slots/tail")


def train(run: TinyRun, output_dir: str, *overrides: str, processes: int = 0) -> Finished:
    """Train to the end, or to `stop_at_step`; fails unless the command succeeds."""
    finished = run.train(f"train.output_dir={output_dir}", *overrides, processes=processes)
    assert finished.exit_code == 0, finished.output[-4000:]
    return finished


def figures(run: TinyRun, output_dir: str) -> dict[int, dict[str, Any]]:
    """`EXACT_FIGURES` by position; each step must have been logged exactly once."""
    records = run.metrics(output_dir)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1)), output_dir
    return {record["step"]: {name: record[name] for name in EXACT_FIGURES} for record in records}


def checkpoints(run: TinyRun, output_dir: str) -> list[str]:
    """Names of the checkpoints, the oldest first; whatever begins like one counts."""
    found = [path.name for path in (run.directory / output_dir).glob("*checkpoint-*")]
    return sorted(found, key=lambda name: int(name.rpartition("-")[2]))


def training_state(checkpoint: Path) -> dict[str, Tensor]:
    """Float32 masters and moments, by `<part>/<parameter>`."""
    return load_file(checkpoint / "training_state.safetensors")


def masters(checkpoint: Path) -> dict[str, Tensor]:
    """Float32 masters by parameter name."""
    state = training_state(checkpoint)
    return {key.removeprefix("master/"): tensor for key, tensor in state.items() if key.startswith("master/")}


def assert_same_bits(checkpoint: Path, wanted: Path) -> None:
    """Masters, moments, adapter, optimizer and plan of two checkpoints are equal, bit for bit."""
    ours, theirs = training_state(checkpoint), training_state(wanted)
    assert ours.keys() == theirs.keys()
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    differing = {key: float((ours[key] - theirs[key]).abs().max()) for key in ours if not ours[key].equal(theirs[key])}
    assert not differing, f"{len(differing)} of {len(ours)} tensors differ by up to {max(differing.values()):.1e}"
    for name in ("training_state.safetensors", "adapter_model.safetensors", "adapter_config.json"):
        assert (checkpoint / name).read_bytes() == (wanted / name).read_bytes(), name
    infos = [json.loads((path / "training_state.json").read_text()) for path in (checkpoint, wanted)]
    for name in ("step", "plan", "optimizer", "scheduler", "global_batch_size"):
        assert infos[0][name] == infos[1][name], name


def max_difference(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest absolute difference of any element."""
    assert tensors.keys() == wanted.keys()
    return max(float((tensors[name] - wanted[name]).abs().max()) for name in wanted)
