"""`metrics.jsonl`: every figure of the run, one JSON object a line, each step once.

A run that was killed between two checkpoints repeats steps when it resumes. Their old lines are moved to
`metrics_superseded.jsonl` then, so that a reader of `metrics.jsonl` sees each step once and nothing is lost.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
SUPERSEDED_FILE = "metrics_superseded.jsonl"


class JsonLines:
    """Appends records to `metrics.jsonl` in the output directory; a disk that fails stops the file, not the run.

    Args:
        directory: the run's output directory, created if missing.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / METRICS_FILE
        self._superseded = directory / SUPERSEDED_FILE
        self._file: TextIO | None = None

    def start(self, start_step: int) -> None:
        """Open the file at a position.

        Args:
            start_step: optimizer updates that are done; lines of later steps are moved away.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._keep_until(start_step)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            self._give_up(error)

    def has(self, kind: str, step: int) -> bool:
        """Whether the file has such a line, of this start of the run or of one before."""
        try:
            return any(record.get("step") == step for record in read_metrics(self._path, kind))
        except OSError:
            return False

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """Append a line and hand it to the system, so that `tail -f` and a crash both see it whole.

        Args:
            kind: train, eval or save.
            record: has `step`. NaN and infinity, which JSON lacks, become null; `non_finite` names them.
        """
        if self._file is None:
            return
        try:
            self._file.write(_encode({"kind": kind, "time": datetime.now(UTC).isoformat(timespec="seconds"), **record}))
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                logger.warning("%s: %s; the last lines may be missing", self._path, error)
            self._file = None

    def _keep_until(self, step: int) -> None:
        if not self._path.exists():
            return
        kept: list[str] = []
        moved: list[str] = []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            record = _decode(line)
            (kept if record is not None and record.get("step", 0) <= step and step > 0 else moved).append(line)
        if not moved:
            return
        with self._superseded.open("a", encoding="utf-8") as superseded:
            superseded.writelines(f"{line}\n" for line in moved)
        # first safe there, then gone here; replaced as a whole, so that a crash leaves the old or the new file
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(self._path)

    def _give_up(self, error: OSError) -> None:
        logger.warning("%s cannot be written: %s; training goes on without it", self._path, error)
        self.close()


def read_metrics(path: Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """Records of a `metrics.jsonl`, in order; a last line that is being written is left out.

    Args:
        path: of the file.
        kind: train, eval or save; None for all.
    """
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            record = _decode(line)
            if record is not None and kind in (None, record.get("kind")):
                yield record


def _encode(record: dict[str, Any]) -> str:
    non_finite = [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
    if non_finite:
        record |= dict.fromkeys(non_finite) | {"non_finite": non_finite}
    return json.dumps(record, allow_nan=False, ensure_ascii=False, default=str) + "\n"


def _decode(line: str) -> dict[str, Any] | None:
    """A record, or None where the process was killed while it wrote the line."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
