"""`events.jsonl` and `environment.json`: what happened to a run, and where each of its starts took place.

`events.jsonl` has one JSON object a line: `event`, `time` (UTC), `step` (steps that were done) and what belongs to it:

| event | when | further fields |
|---|---|---|
| `started` | a process began, or went on | `life` (from 1), `num_steps`, `resumed_from` or `started_from` |
| `checkpoint` | one is whole on the disk | `name`, `bytes`, `write_seconds` |
| `stopped` | it ended before its last step, and was to | `signal` (a name, or null), `reason` |
| `failed` | an error ended it | `error` (type), `message`, `exit_code` |
| `done` | its last step is done | `adapter` (path) |

A start without one of the last three still goes on, or its process was killed. `environment.json` has a list `lives`,
one entry per start. Neither has secrets, and a disk that fails stops them, not the run.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

EVENTS_FILE = "events.jsonl"
ENVIRONMENT_FILE = "environment.json"

#: Starts that are remembered; a run that is restarted more often has another trouble.
MAX_LIVES = 200
#: Of a message; the whole one is in the log.
_MAX_MESSAGE = 2000


class EventLog:
    """Appends to `events.jsonl`; the file appears with the first event. May be used by several threads.

    Args:
        directory: the run's.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / EVENTS_FILE
        self._lock = threading.Lock()
        self._has_failed = False

    def write(self, event: str, /, step: int | None = None, **fields: Any) -> None:
        """Append an event.

        Args:
            event: its name.
            step: steps that were done then; None where nobody knows.
            fields: JSON values; texts are cut at a length.
        """
        record = {"event": event, "time": now(), "step": step, **fields}
        cut = {key: value[:_MAX_MESSAGE] if isinstance(value, str) else value for key, value in record.items()}
        try:
            line = json.dumps(cut, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n"
            with self._lock:
                if self._has_failed:
                    return
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("ab") as file:  # opened anew: events are rare, and a killed run leaves it whole
                    file.write(line)
        except OSError as error:
            self._has_failed = True
            logger.warning("%s cannot be written: %s; training goes on without it", self._path, error)


def add_life(directory: Path, facts: Mapping[str, Any]) -> int:
    """Add a start of the run to `environment.json`.

    Args:
        directory: the run's.
        facts: of this start; JSON values without secrets.

    Returns:
        Which start it is, from 1.
    """
    path = directory / ENVIRONMENT_FILE
    lives = read_lives(path)
    last = lives[-1].get("life") if lives else 0
    number = (last if isinstance(last, int) else len(lives)) + 1
    lives = [*lives[-MAX_LIVES + 1 :], {"life": number, "time": now(), **facts}]
    temporary = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"lives": lives}, indent=1, ensure_ascii=False, default=str)
        temporary.write_bytes(text.encode("utf-8", "backslashreplace") + b"\n")
        temporary.replace(path)
    except OSError as error:
        logger.warning("%s cannot be written: %s; training goes on without it", path, error)
    return number


def read_lives(path: Path) -> list[dict[str, Any]]:
    """The starts in an `environment.json`, oldest first; none where there is no such file or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return []
    lives = content.get("lives") if isinstance(content, dict) else None
    return [life for life in lives if isinstance(life, dict)] if isinstance(lives, list) else []


def now() -> str:
    """The time, UTC, in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")
