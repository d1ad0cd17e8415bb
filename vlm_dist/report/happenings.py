"""What happened to a run, in the order of its steps and times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np

from vlm_dist.report.evaluations import figures_by_source
from vlm_dist.report.lines import as_number, parse_time
from vlm_dist.report.run_files import RunRecord

Kind = Literal["start", "end", "checkpoint", "evaluation", "non-finite", "skipped"]

#: Kinds in the order in which they are shown.
KINDS: tuple[Kind, ...] = ("start", "end", "checkpoint", "evaluation", "non-finite", "skipped")


@dataclass(frozen=True)
class Happening:
    """One event.

    Attributes:
        kind: of it.
        step: steps that were done then.
        what: in a few words.
        detail: further words.
        time: seconds since 1970; None where nobody knows.
        level: good, warn, bad or empty.
    """

    kind: Kind
    step: int
    what: str
    detail: str = ""
    time: float | None = None
    level: str = ""


@dataclass(frozen=True)
class CheckpointRow:
    """What is known of a checkpoint.

    Attributes:
        step: steps that were done.
        status: best, kept, removed, incomplete, or being written.
        stall_seconds: that the loop stood still for it; None where nobody knows.
        num_bytes: on the disk; None where nobody knows.
        write_seconds: in the background.
        time: when it was begun, in seconds since 1970.
        path: where it lies; empty where it is no more.
    """

    step: int
    status: str
    stall_seconds: float | None = None
    num_bytes: int | None = None
    write_seconds: float | None = None
    time: float | None = None
    path: str = ""

    @property
    def level(self) -> str:
        """The colour of the status."""
        return {"best": "good", "incomplete": "bad", "being written": "warn"}.get(self.status, "")


def happenings_of(run: RunRecord) -> list[Happening]:
    """Everything that happened, in order."""
    found = [*_starts_and_ends(run), *_checkpoints(run), *_evaluations(run), *_nonfinite(run), *_skipped(run)]
    rank = {"start": 0, "end": 2}  # within one second

    def place(one: Happening) -> tuple[float, int, int]:
        return one.time if one.time is not None else _time_at(run, one.step), rank.get(one.kind, 1), one.step

    return sorted(found, key=place)


def checkpoint_rows(run: RunRecord) -> list[CheckpointRow]:
    """All checkpoints that there were, by step; of one that was written twice the last."""
    rows: dict[int, dict[str, Any]] = {}
    for save in run.saves:
        rows.setdefault(save["step"], {}).update(
            stall_seconds=as_number(save.get("save_stall_seconds")), time=parse_time(save.get("time"))
        )
    for event in run.events:
        if event["event"] == "checkpoint" and type(event.get("step")) is int:
            size = as_number(event.get("bytes"))
            rows.setdefault(event["step"], {}).update(
                num_bytes=None if size is None else int(size), write_seconds=as_number(event.get("write_seconds"))
            )
    best = run.best["step"] if run.best is not None else None
    for step, here in run.checkpoints.items():
        row = rows.setdefault(step, {})
        status = "incomplete" if not here.is_complete else "best" if step == best else "kept"
        row.update(num_bytes=here.num_bytes, path=str(here.path), status=status)
    newest = max(rows, default=None)
    has_events = any(event["event"] == "checkpoint" for event in run.events)
    for step, row in rows.items():
        if "status" not in row:
            is_coming = step == newest and has_events and "write_seconds" not in row
            row["status"] = "being written" if is_coming else "removed"
    return [CheckpointRow(step, **row) for step, row in sorted(rows.items())]


def _starts_and_ends(run: RunRecord) -> list[Happening]:
    found = []
    is_open = False
    last: Mapping[str, Any] = {}
    for event in run.events:
        name, time = event["event"], parse_time(event.get("time"))
        step = event["step"] if type(event.get("step")) is int else _last_step(run, time)
        if name == "started":
            if is_open:
                number = last.get("life", "?")
                before, words = None if time is None else time - 1, "killed, or the machine failed"
                what = f"start {number} ended without a word"
                found.append(Happening("end", _last_step(run, before), what, words, before, "bad"))
            is_open, last = True, event
            found.append(_start(event, step, time))
        elif name == "done":
            found.append(Happening("end", step, "done", "", time, "good"))
        elif name == "stopped":
            said = [str(event[key]) for key in ("reason", "signal") if event.get(key)]
            found.append(Happening("end", step, "stopped", ", ".join(said), time, "warn"))
        elif name == "failed":
            said = [str(event.get("error", "")), str(event.get("message", ""))]
            found.append(Happening("end", step, "failed", ": ".join(said), time, "bad"))
        if name in ("done", "stopped", "failed"):
            is_open = False
    return found


def _start(event: Mapping[str, Any], step: int, time: float | None) -> Happening:
    host, ranks = event.get("host"), event.get("world_size")
    said = []
    if event.get("resumed_from"):
        said.append(f"from {event['resumed_from']}")
    if event.get("started_from"):
        said.append(f"with the weights of {event['started_from']}")
    if type(ranks) is int:
        said.append(f"{ranks} rank{'' if ranks == 1 else 's'}")
    if host:
        said.append(f"on {host}")
    what = "resumed" if event.get("resumed_from") else "started"
    again = f" (start {event['life']})" if event.get("life") not in (None, 1) else ""
    return Happening("start", step, f"{what} at step {step}{again}", ", ".join(said), time)


def _checkpoints(run: RunRecord) -> list[Happening]:
    found = []
    for row in checkpoint_rows(run):
        said = [row.status]
        if row.num_bytes is not None:
            said.append(size(row.num_bytes))
        if row.stall_seconds is not None:
            said.append(f"training stood still for {row.stall_seconds:.2f} s")
        level = row.level if row.status != "best" else "good"
        found.append(Happening("checkpoint", row.step, f"checkpoint-{row.step}", ", ".join(said), row.time, level))
    return found


def _evaluations(run: RunRecord) -> list[Happening]:
    found = []
    for record in run.evals:
        said = [
            f"{source} {name.replace('_', ' ')} {'-' if np.isnan(value) else f'{value:.4g}'}"
            for name, values in figures_by_source(record).items()
            if not name.startswith("num_")
            for source, value in values.items()
        ]
        found.append(
            Happening("evaluation", record["step"], "evaluation", ", ".join(said), parse_time(record.get("time")))
        )
    return found


def _nonfinite(run: RunRecord) -> list[Happening]:
    counts = np.nan_to_num(run.train["num_nonfinite_steps"])
    windows, times = run.train.window_steps, run.train["time"]
    return [
        Happening("non-finite", int(run.train.step[row]), "gradient not finite",
                  f"{int(counts[row])} of {int(windows[row])} steps without an update", _or_none(times[row]), "bad")
        for row in np.flatnonzero(counts > 0)
    ]  # fmt: skip


def _skipped(run: RunRecord) -> list[Happening]:
    """One per line of the metrics, as the classes were counted over all ranks."""
    found = []
    times = run.train["time"]
    prefix = "null_slots/"
    classes = [name for name in run.train.names if name.startswith(prefix) and name != f"{prefix}tail"]
    counts = {name.removeprefix(prefix): np.nan_to_num(run.train[name]) for name in classes}
    total = sum(counts.values(), np.zeros(len(run.train)))
    for row in np.flatnonzero(total > 0):
        said = ", ".join(f"{name} {int(count[row])}" for name, count in counts.items() if count[row])
        number = int(total[row])
        found.append(
            Happening("skipped", int(run.train.step[row]), f"{number} sample{'' if number == 1 else 's'} skipped",
                      said, _or_none(times[row]), "warn")
        )  # fmt: skip
    return found


def _last_step(run: RunRecord, time: float | None) -> int:
    """The last step that is on record before a time."""
    steps = [0]
    for lines in (run.train, run.superseded):
        chosen = lines.step if time is None else lines.step[lines["time"] <= time]
        steps.append(int(chosen[-1]) if len(chosen) else 0)
    times = [lines["time"][lines["time"] <= (time or np.inf)] for lines in (run.train, run.superseded)]
    newest = [float(one[-1]) if len(one) else -np.inf for one in times]
    return steps[1] if newest[0] >= newest[1] else steps[2]


def _time_at(run: RunRecord, step: int) -> float:
    row = int(np.searchsorted(run.train.step, step, side="right")) - 1
    time = float(run.train["time"][row]) if row >= 0 else 0.0
    return 0.0 if np.isnan(time) else time


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def size(num_bytes: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def clock_time(seconds: float | None) -> str:
    """A time for people, UTC; `-` where it is not known."""
    if seconds is None:
        return "-"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
