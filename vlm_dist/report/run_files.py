"""Reads the directory of a run, whatever state it is in: going on, ended, killed in the middle of a line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlm_dist.config.masking import without_secrets
from vlm_dist.data.quarantine import read_quarantine
from vlm_dist.errors import DataError
from vlm_dist.observability.events import ENVIRONMENT_FILE, EVENTS_FILE, read_lives
from vlm_dist.observability.jsonl import METRICS_FILE, SUPERSEDED_FILE
from vlm_dist.report.lines import Lines, as_number

# as `vlm_dist.checkpoint` writes them, whose import would take seconds; a test compares them
CONFIG_FILE = "resolved_config.yaml"
BEST_FILE = "best_checkpoint.json"
COMPLETE_FILE = "COMPLETE"
FINAL_ADAPTER = "adapter"
PREDICTIONS = "predictions"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_PREDICTED = re.compile(r"step-(\d+)\.jsonl")
_MAX_PREDICTIONS = 100_000
_MAX_KEPT_TEXT = 20_000


@dataclass(frozen=True)
class CheckpointOnDisk:
    """A checkpoint's directory."""

    step: int
    path: Path
    num_bytes: int
    is_complete: bool


@dataclass
class RunRecord:
    """What a run has left so far.

    Attributes:
        path: its directory.
        name: what it is called, also beside others.
        train: lines of training steps that count.
        superseded: lines of steps that were done again after a resume, or of an earlier run in this directory.
        evals: evaluations, by step.
        saves: what checkpoints cost the loop.
        events: of `events.jsonl`; none in older runs.
        lives: of `environment.json`.
        config: resolved, without secrets; empty where it is missing.
        config_text: the same as YAML.
        best: of `best_checkpoint.json`.
        checkpoints: by step.
        has_adapter: whether the final adapter was published.
        quarantine: records of skipped samples, by step.
        predictions_step: of the last evaluation with answers; None without any.
        predictions: its answers.
        remarks: what is damaged, in words.
        last_sign: when a file of it was last written, in seconds since 1970.
    """

    path: Path
    name: str
    train: Lines
    superseded: Lines
    evals: list[dict[str, Any]] = field(default_factory=list)
    saves: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    lives: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    best: dict[str, Any] | None = None
    checkpoints: dict[int, CheckpointOnDisk] = field(default_factory=dict)
    has_adapter: bool = False
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    predictions_step: int | None = None
    predictions: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    last_sign: float = 0.0


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Read several runs.

    Raises:
        DataError: one is no run or cannot be read; names all that are not.
    """
    runs, problems = [], []
    names = distinct_labels(paths)
    for path, name in zip(paths, names, strict=True):
        try:
            runs.append(read_run(path, name))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return runs


def read_run(path: Path, name: str | None = None) -> RunRecord:
    """Read a run.

    Args:
        path: its output directory.
        name: what it is called; that of the directory when None.

    Raises:
        DataError: it is no directory of a run, or a file in it cannot be read.
    """
    _check_is_run(path)
    remarks: list[str] = []
    by_kind: dict[str, list[dict[str, Any]]] = {"train": [], "eval": [], "save": []}
    for record in _json_lines(path / METRICS_FILE, remarks):
        by_kind.setdefault(str(record.get("kind")), []).append(record)
    train = Lines(by_kind["train"])
    if train.num_odd:
        remarks.append(f"{METRICS_FILE}: lines without a step are left out: {train.num_odd}")
    superseded = Lines(record for record in _json_lines(path / SUPERSEDED_FILE, remarks) if record["kind"] == "train")
    config, config_text = _read_config(path / CONFIG_FILE, remarks)
    step, predictions = _last_predictions(path / PREDICTIONS, remarks)
    return RunRecord(
        path=path,
        name=name or path.resolve().name,
        train=train,
        superseded=superseded,
        evals=[record for record in by_kind["eval"] if type(record.get("step")) is int],
        saves=[record for record in by_kind["save"] if type(record.get("step")) is int],
        events=_json_lines(path / EVENTS_FILE, remarks, "event"),
        lives=read_lives(path / ENVIRONMENT_FILE),
        config=config,
        config_text=config_text,
        best=_read_best(path / BEST_FILE, remarks),
        checkpoints=_checkpoints(path),
        has_adapter=(path / FINAL_ADAPTER).is_dir(),
        quarantine=read_quarantine(path),
        predictions_step=step,
        predictions=predictions,
        remarks=remarks,
        last_sign=_last_sign(path),
    )


def distinct_labels(paths: Sequence[Path]) -> list[str]:
    """Short names of directories that tell them apart: their last parts, as many as it takes."""
    resolved = [path.resolve() for path in paths]
    labels = [path.name or str(path) for path in resolved]
    for depth in range(2, 6):
        if len(set(labels)) == len(labels):
            return labels
        labels = [
            label if labels.count(label) == 1 else "/".join(path.parts[-depth:])
            for label, path in zip(labels, resolved, strict=True)
        ]
    return [label if labels.count(label) == 1 else f"{label} ({n})" for n, label in enumerate(labels, 1)]


def _check_is_run(path: Path) -> None:
    advice = "give the output_dir of a run, which has metrics.jsonl"
    if not path.exists():
        raise DataError(f"{path}: no such directory; {advice}")
    if not path.is_dir():
        raise DataError(f"{path}: is a file; {advice}" + (f": {path.parent}" if path.name == METRICS_FILE else ""))
    try:
        names = sorted(entry.name for entry in os.scandir(path))
        if _is_run(path):
            return
        inside = [name for name in names if (path / name).is_dir() and _is_run(path / name)]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if inside:
        shown = " ".join(str(path / name) for name in inside[:5]) + (" …" if len(inside) > 5 else "")
        raise DataError(f"{path}: is no run, but has some; name those that you want: {shown}")
    raise DataError(f"{path}: is no run: it has none of {METRICS_FILE}, {EVENTS_FILE} and {CONFIG_FILE}; {advice}")


def _is_run(path: Path) -> bool:
    # a checkpoint has a resolved configuration, too
    return any((path / name).is_file() for name in (METRICS_FILE, EVENTS_FILE)) or (
        (path / CONFIG_FILE).is_file() and not _CHECKPOINT.fullmatch(path.name)
    )


def _json_lines(path: Path, remarks: list[str], key: str = "kind") -> list[dict[str, Any]]:
    """Records of a file; a last line that is being written is left out, damaged ones are told of.

    Raises:
        DataError: it is there and cannot be read.
    """
    records: list[dict[str, Any]] = []
    damaged: list[int] = []
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                if isinstance(record, dict) and isinstance(record.get(key), str):
                    records.append(record)
                elif line.endswith("\n") and line.strip():
                    damaged.append(number)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if damaged:
        remarks.append(
            f"{path.name}: damaged lines are left out: {len(damaged)}, the first is line {damaged[0]}; "
            "a run that is killed may leave half a line"
        )
    return records


def _read_config(path: Path, remarks: list[str]) -> tuple[dict[str, Any], str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        content = yaml.safe_load(text)
    except FileNotFoundError:
        remarks.append(f"{path.name} is missing")
        return {}, ""
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, RecursionError):
        remarks.append(f"{path.name} is damaged, and left out")
        return {}, ""
    if not isinstance(content, dict):
        remarks.append(f"{path.name} is empty or damaged, and left out")
        return {}, ""
    config = without_secrets(content)  # also where an older version wrote it
    return config, yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _read_best(path: Path, remarks: list[str]) -> dict[str, Any] | None:
    try:
        best = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        best = None
    is_good = isinstance(best, dict) and type(best.get("step")) is int and as_number(best.get("value")) is not None
    if not is_good:
        remarks.append(f"{path.name} is damaged, and left out")
        return None
    return {"metric": "?", **best}


def _checkpoints(path: Path) -> dict[int, CheckpointOnDisk]:
    found = {}
    for entry in path.iterdir():
        match = _CHECKPOINT.fullmatch(entry.name)
        if match is None:
            continue
        try:
            num_bytes = sum(file.stat().st_size for file in entry.iterdir())
            found[int(match[1])] = CheckpointOnDisk(int(match[1]), entry, num_bytes, (entry / COMPLETE_FILE).is_file())
        except OSError:  # it is being removed just now
            continue
    return dict(sorted(found.items()))


def _last_predictions(directory: Path, remarks: list[str]) -> tuple[int | None, list[dict[str, Any]]]:
    files = [(_PREDICTED.fullmatch(path.name), path) for path in directory.glob("step-*.jsonl")]
    steps = {int(match[1]): path for match, path in files if match}
    if not steps:
        return None, []
    step = max(steps)
    rows: list[dict[str, Any]] = []
    try:
        with steps[step].open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if len(rows) == _MAX_PREDICTIONS:
                    break
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(row, dict):
                    cut = {k: v[:_MAX_KEPT_TEXT] if isinstance(v, str) else v for k, v in row.items()}
                    rows.append(cut)
    except OSError as error:
        remarks.append(f"{steps[step]} cannot be read: {error.strerror}")
    return step, rows


def _last_sign(path: Path) -> float:
    times = []
    for name in (METRICS_FILE, EVENTS_FILE, ENVIRONMENT_FILE, CONFIG_FILE):
        try:
            times.append((path / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)
