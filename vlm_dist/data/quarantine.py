"""Keeps a record of the samples that could not be used: one line of JSON each, and counts by class."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from vlm_dist.data.types import NullSlot
from vlm_dist.data.whole_lines import end_of_lines
from vlm_dist.errors import DataError, printable

log = logging.getLogger(__name__)

_NUM_SHOWN = 5  # per class; the file has all
_FIELDS = {"source", "shard", "key", "class", "message", "step", "rank", "purpose"}


class Quarantine:
    """Appends null slots to `<output_dir>/quarantine/rank-<rank>.jsonl`; the file appears with the first line.

    A line has source, shard, key, offset (of the sample's first member in the shard, in bytes; null where there is no
    such thing), class, message, step, rank and purpose. Evaluation writes a sample down each time it meets it; a run
    that is continued from a checkpoint writes down the steps since then again.

    A line that a killed run left half written is removed before the first line of the run that goes on.

    Empty slots at the end of an epoch are counted, but not written: no sample is behind them.

    Args:
        output_dir: of the run.
        rank: of this process; every rank has a file of its own, so that none waits for another.

    Attributes:
        counts: null slots of this process by class.
    """

    def __init__(self, output_dir: str | Path, rank: int) -> None:
        self.path = Path(output_dir) / "quarantine" / f"rank-{rank:05d}.jsonl"
        self.counts: Counter[str] = Counter()
        self._rank = rank
        self._stream: IO[str] | None = None
        self._is_failed = False

    def record(self, step: int, null_slots: Sequence[NullSlot], purpose: str = "train") -> None:
        """Write down the null slots of one step.

        Args:
            step: of the plan; for evaluation the position, in steps, at which it took place.
            null_slots: of this process.
            purpose: "train" or "eval".
        """
        for slot in null_slots:
            self.counts[slot.null_class] += 1
            if slot.origin is None:
                continue
            self._write(
                {
                    "source": slot.origin.source,
                    "shard": slot.origin.shard,
                    "key": slot.origin.key,
                    "offset": slot.origin.offset,
                    "class": slot.null_class,
                    "message": slot.message,
                    "step": step,
                    "rank": self._rank,
                    "purpose": purpose,
                }
            )
            if self.counts[slot.null_class] <= _NUM_SHOWN:
                told = printable(f"{slot.origin} is skipped ({slot.null_class}): {slot.message}")
                log.warning("%s", told)
            if self.counts[slot.null_class] == _NUM_SHOWN:
                log.warning("more samples skipped as %s are only written to %s", slot.null_class, self.path)

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, record: dict[str, Any]) -> None:
        """Append a line; a disk that fails costs the record, not the run: this rank's peers would wait for it."""
        if self._is_failed:
            return
        try:
            if self._stream is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._stream = self.path.open("a", encoding="utf-8", errors="replace")
                os.truncate(self.path, end_of_lines(self.path))
            self._stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._stream.flush()
        except OSError as error:
            self._is_failed = True
            log.warning("%s cannot be written (%s); skipped samples are counted, but no longer named", self.path, error)


def read_quarantine(output_dir: str | Path) -> list[dict[str, Any]]:
    """Read the records of all ranks, ordered by step.

    A damaged line is told of in the log and left out; so is, without a word, a last line that is cut: the run that
    wrote it was killed, or is still writing.

    Raises:
        DataError: a file cannot be read.
    """
    records: list[dict[str, Any]] = []
    for path in sorted((Path(output_dir) / "quarantine").glob("rank-*.jsonl")):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        whole, damaged = lines[:-1], []
        for number, line in enumerate(whole, 1):
            record = _parse(line)
            if record is None:
                damaged.append(number)
            else:
                records.append(record)
        if damaged:
            log.warning(
                "%s: %d of %d lines are no records of skipped samples and are left out, first line %d; the run may "
                "have been killed while it wrote",
                path, len(damaged), len(whole), damaged[0],
            )  # fmt: skip
    return sorted(records, key=lambda record: (record["step"], record["rank"]))


def _parse(line: str) -> dict[str, Any] | None:
    """The record of a line; None where it has none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not set(record) >= _FIELDS:
        return None
    return record if type(record["step"]) is int and type(record["rank"]) is int else None
