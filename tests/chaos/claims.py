"""What has to hold of a run that was disturbed: it is the undisturbed one, but for the time that it took."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from vlm_dist.data.ledger import LedgerSample, read_ledger

#: Greatest difference of a master weight between layouts after ten steps of at most 1e-3 each: rounding of float32.
WEIGHT_TOLERANCE = 5e-6
#: Relative difference of a loss between layouts.
LOSS_TOLERANCE = 2e-6

FINGERPRINT = ("training_state.safetensors", "adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class Reference:
    """An undisturbed run."""

    directory: Path
    num_steps: int

    @property
    def samples(self) -> dict[int, tuple[LedgerSample, ...]]:
        return {step: record.samples for step, record in read_ledger(self.directory).items()}


def violations(directory: Path, reference: Reference, *, same_layout: bool) -> Iterator[str]:
    """Every claim that does not hold, in words.

    Args:
        directory: output_dir of the run that was disturbed, and is complete.
        reference: the run that it is to equal.
        same_layout: bit for bit; else to rounding.
    """
    final = f"checkpoint-{reference.num_steps}"
    yield from _ledger(directory, reference)
    for place in (final, "adapter"):
        if not (directory / place).is_dir():
            yield f"there is no {place}"
            return
    if not (directory / final / "COMPLETE").is_file():
        yield f"{final} has no marker"
    for place, names in ((final, FINGERPRINT), ("adapter", FINGERPRINT[1:])):
        for name in names:
            yield from _file(directory / place / name, reference.directory / place / name, same_layout)
    yield from _metrics(directory / "metrics.jsonl", reference.directory / "metrics.jsonl", same_layout)
    left = sorted({path.name for path in directory.iterdir() if path.name.startswith(".")} - {".saved-by.json"})
    if left:
        yield f"left behind: {', '.join(left)}"


def _ledger(directory: Path, reference: Reference) -> Iterator[str]:
    ledger = read_ledger(directory)
    wanted = reference.samples
    if list(ledger) != list(wanted):
        yield f"the ledger has steps {list(ledger)} instead of {list(wanted)}"
    for step, record in ledger.items():
        if record.missing_ranks:
            yield f"step {step}: no line of ranks {record.missing_ranks}"
        ours, theirs = record.samples, wanted.get(step, ())
        if ours != theirs:
            lost, more = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
            yield f"step {step}: {len(lost)} samples lost {lost[:2]}, {len(more)} not of this step {more[:2]}"


def _file(ours: Path, theirs: Path, same_layout: bool) -> Iterator[str]:
    name = f"{ours.parent.name}/{ours.name}"
    if not ours.is_file():
        yield f"{name} is missing"
    elif ours.read_bytes() == theirs.read_bytes():
        return
    elif ours.suffix != ".safetensors":
        yield f"{name} differs"
    else:
        a, b = load_file(ours), load_file(theirs)
        if a.keys() != b.keys():
            yield f"{name} has other tensors"
            return
        masters = [key for key in a if not key.startswith("exp_avg")]
        difference = max(float(np.abs(a[key] - b[key]).max()) for key in masters)
        if same_layout or difference > WEIGHT_TOLERANCE:
            yield f"{name} differs by up to {difference:.1e}"


def _metrics(ours: Path, theirs: Path, same_layout: bool) -> Iterator[str]:
    a, b = _losses(ours), _losses(theirs)
    if [step for step, _ in a] != [step for step, _ in b]:
        yield f"metrics.jsonl has steps {[step for step, _ in a]}"
        return
    tolerance = 0.0 if same_layout else LOSS_TOLERANCE
    for (step, loss), (_, wanted) in zip(a, b, strict=True):
        if abs(loss - wanted) > tolerance * abs(wanted):
            yield f"the loss of step {step} is {loss!r} instead of {wanted!r}"


def _losses(path: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]


def steps_lost(directory: Path) -> int:
    """Steps that were done and had to be done again, over all restarts."""
    reached: dict[int, int] = {}
    starts: dict[int, int] = {}
    for path in (directory / "ledger").glob("rank-*.jsonl"):
        for line in path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            attempt = record["attempt"]
            if "start_step" in record:
                starts[attempt] = record["start_step"]
            else:
                reached[attempt] = max(reached.get(attempt, 0), record["step"] + 1)
    lost = 0
    for attempt, start in starts.items():
        before = [reached[other] for other in reached if other == attempt - 1]
        lost += max(0, before[0] - start) if before else 0
    return lost
