"""Run directories as the trainer leaves them, in any state."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

BEGAN = datetime(2026, 3, 1, 12, tzinfo=UTC)


def train_line(step: int, **fields: Any) -> dict[str, Any]:
    """A line of a step that took 2 s and had 1,000 tokens of 10 samples a second."""
    line = {
        "kind": "train", "time": at(step), "step": step, "num_steps": 40, "loss": 4.0 / step, "learning_rate": 1e-3,
        "grad_norm": 1.0, "tokens_per_second": 1000.0, "samples_per_second": 10.0, "padding_share": 0.1,
        "data_wait_share": 0.05, "step_seconds": 2.0, "num_window_steps": 1, "num_skipped": 0,
        "host_memory_bytes": 2**30,
    }  # fmt: skip
    return line | fields


def at(second: float) -> str:
    return (BEGAN + timedelta(seconds=second)).isoformat(timespec="seconds")


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_run(directory: Path, lines: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]] = ()) -> Path:
    """A directory with metrics, a configuration, and events where there are some."""
    write_lines(directory / "metrics.jsonl", lines)
    (directory / "resolved_config.yaml").write_text("model_id: tiny\ntrain:\n  learning_rate: 0.001\n  seed: 1\n")
    if events:
        write_lines(directory / "events.jsonl", events)
    return directory


def started(second: float, step: int = 0, life: int = 1, **fields: Any) -> dict[str, Any]:
    return {"event": "started", "time": at(second), "step": step, "life": life, "num_steps": 40, "host": "elsewhere",
            "pid": 1, "process_started": 1.0, "world_size": 2, **fields}  # fmt: skip
