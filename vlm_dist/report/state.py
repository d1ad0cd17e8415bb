"""What has become of a run, from its files alone."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import psutil

from vlm_dist.report.lines import as_number, parse_time
from vlm_dist.report.run_files import RunRecord

Word = Literal["running", "done", "stopped", "failed", "killed", "silent", "not begun"]

#: A run that has said nothing for so long, and for several times as long as between two lines, may be no more.
PATIENCE_SECONDS = 600.0
_PATIENCE_LINES = 5
_ENDINGS = ("done", "stopped", "failed")


@dataclass(frozen=True)
class State:
    """State of a run.

    Attributes:
        word: `killed`: its process is gone without a word; `silent`: nothing has been heard of it for long, and it
            ran on another machine, so that nobody knows.
        detail: in words; empty where there is nothing to add.
        error: what ended it, where it failed.
    """

    word: Word
    detail: str = ""
    error: str = ""

    @property
    def level(self) -> str:
        """The colour that goes with it."""
        levels = {"done": "good", "running": "good", "failed": "bad", "killed": "bad", "silent": "warn"}
        return levels.get(self.word, "warn")


def state_of(run: RunRecord, now: float | None = None) -> State:
    """Judge a run.

    Args:
        run: as read.
        now: seconds since 1970; None: now.
    """
    now = time.time() if now is None else now
    starts = [number for number, event in enumerate(run.events) if event["event"] == "started"]
    since_start = run.events[starts[-1] :] if starts else run.events
    ending = next((event for event in reversed(since_start) if event["event"] in _ENDINGS), None)
    if ending is not None:
        return _ended(ending)
    if not starts:
        return _by_steps(run, now)
    alive = _is_alive(since_start[0])
    if alive:
        return State("running", f"last heard of {ago(now - run.last_sign)} ago")
    if alive is False:
        return State("killed", f"its process is gone without a word; last heard of {ago(now - run.last_sign)} ago")
    return _by_age(run, now)


def _ended(event: dict[str, Any]) -> State:
    if event["event"] == "done":
        return State("done")
    if event["event"] == "stopped":
        reason, signal = str(event.get("reason") or "asked to stop"), event.get("signal")
        return State("stopped", f"{reason} {signal}" if signal and signal not in reason else reason)
    code = event.get("exit_code")
    error = f"{event.get('error', 'error')}: {event.get('message', '')}"
    return State("failed", f"exit code {code}" if code is not None else "", error)


def _by_steps(run: RunRecord, now: float) -> State:
    """Of a run of an earlier version, which wrote no events."""
    total = num_steps(run)
    if not len(run.train):
        return State("not begun", "no step is on record")
    if run.has_adapter and total is not None and run.train.step[-1] >= total:
        return State("done")
    return _by_age(run, now)


def _by_age(run: RunRecord, now: float) -> State:
    silence = now - run.last_sign
    gaps = np.diff(run.train["time"])
    usual = float(np.nanmax(gaps[-20:])) if np.isfinite(gaps[-20:]).any() else 0.0
    heard = f"last heard of {ago(silence)} ago"
    if silence < max(PATIENCE_SECONDS, _PATIENCE_LINES * usual):
        return State("running", heard)
    return State("silent", f"{heard}: killed, or it hangs")


def _is_alive(started: dict[str, Any]) -> bool | None:
    """Whether the process of a start lives; None where it ran on another machine or nobody knows."""
    pid, began = started.get("pid"), as_number(started.get("process_started"))
    if type(pid) is not int or began is None or started.get("host") != socket.gethostname():
        return None
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - began) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, ValueError, OverflowError):
        return None


def num_steps(run: RunRecord) -> int | None:
    """Steps of the whole run."""
    told = run.train.last("num_steps")
    for event in run.events:
        if event["event"] == "started" and as_number(event.get("num_steps")) is not None:
            told = max(told or 0.0, float(event["num_steps"])) if not len(run.train) else told
    return int(told) if told is not None else None


def steps_done(run: RunRecord) -> int:
    """Optimizer updates that are done, as far as is known."""
    last = int(run.train.step[-1]) if len(run.train) else 0
    starts = [n for n, event in enumerate(run.events) if event["event"] == "started"]
    told = [e.get("step") for e in run.events[starts[-1] if starts else 0 :]]
    return max([last, *(step for step in told if type(step) is int)])


def began_at(run: RunRecord) -> float | None:
    """When it was first started, in seconds since 1970."""
    times = [parse_time(event.get("time")) for event in run.events[:1]]
    if len(run.train):
        times.append(as_number(float(run.train["time"][0])))
    known = [one for one in times if one is not None]
    return min(known, default=None)


def ago(seconds: float) -> str:
    """A time for people: 40 s, 3 min, 2 h 5 min, 3 d 4 h."""
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 or seconds == 0 else f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min {seconds - minutes * 60:.0f} s" if minutes < 10 else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
