"""Keeps a record of what was trained on: the samples of each applied step, by which two runs can be compared.

The names came with the tensors, and are not those of the plan: a sample that was lost on the way is missing here.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vlm_dist.data.types import MicroBatch, StepPlan
from vlm_dist.data.whole_lines import end_of_lines
from vlm_dist.distributed.group import Ranks
from vlm_dist.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, order=True)
class LedgerSample:
    """One sample that was trained on.

    Attributes:
        source: name of its source.
        shard: file that it lies in.
        key: its name there.
        epoch: from 0.
        repeat: which pass over the source within the epoch, from 0.
    """

    source: str
    shard: str
    key: str
    epoch: int
    repeat: int


@dataclass(frozen=True, slots=True)
class LedgerStep:
    """One step as all ranks did it in the attempt that counts.

    Attributes:
        attempt: which start of the run did it, from 1.
        samples: whose tensors were in the update, sorted; empty where nothing was updated.
        null_slots: empty slots by class.
        is_applied: the update was made; not where the gradient was not finite, or no token had a label.
        missing_ranks: whose lines are missing, as their processes or their disk ended before.
    """

    attempt: int
    samples: tuple[LedgerSample, ...]
    null_slots: dict[str, int]
    is_applied: bool
    missing_ranks: tuple[int, ...]


class SampleLedger:
    """Appends to `<output_dir>/ledger/rank-<rank>.jsonl`: a line when the run starts or resumes, and one per step.

    Both have `attempt`, which counts the starts; the first also `start_step` and `world_size`, the second `step` (of
    the plan, from 0), `applied`, `samples` (lists of source, shard, key, epoch, repeat) and `null_slots`. A disk that
    fails costs the lines, not the run; `read_ledger` tells of the gap.

    Args:
        output_dir: of the run.
        rank: of this process; every rank has a file of its own.
        world_size: number of ranks.
        attempt: the same on all ranks, above that of any line that is there.
        start_step: steps that are done; what earlier attempts did beyond them does not count any more.
    """

    def __init__(self, output_dir: str | Path, rank: int, world_size: int, attempt: int, start_step: int) -> None:
        self.path = _directory(output_dir) / f"rank-{rank:05d}.jsonl"
        self.attempt = attempt
        self._stream: IO[str] | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self.path.open("a", encoding="utf-8", errors="replace")
            os.truncate(self.path, end_of_lines(self.path))
        except OSError as error:
            self._give_up(error)
        self._write({"attempt": attempt, "start_step": start_step, "rank": rank, "world_size": world_size})

    @classmethod
    def open(cls, output_dir: str | Path, ranks: Ranks, start_step: int) -> SampleLedger:
        """Begin another attempt. Collective: every rank calls this.

        Args:
            output_dir: of the run; it need not be the same disk on all ranks.
            ranks: this process among its peers.
            start_step: steps that are done.
        """
        seen = ranks.gather_objects(_last_attempt(output_dir))
        return cls(output_dir, ranks.rank, ranks.world_size, max(seen) + 1, start_step)

    def record(self, plan: StepPlan, micro_batches: Sequence[MicroBatch], *, is_applied: bool) -> None:
        """Write down one step, after its update.

        Args:
            plan: of the step.
            micro_batches: of this rank.
            is_applied: the update was made.
        """
        epoch = math.ceil(plan.epoch) - 1
        null_slots = Counter(slot.null_class for batch in micro_batches for slot in batch.null_slots)
        samples = [
            [origin.source, origin.shard, origin.key, epoch, ref.repeat]
            for batch in micro_batches
            for origin, ref in zip(batch.origins, batch.refs, strict=True)
        ]
        self._write(
            {
                "attempt": self.attempt,
                "step": plan.step,
                "applied": is_applied,
                "samples": samples,
                "null_slots": null_slots,
            }
        )

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            try:
                self._stream.close()
            except OSError as error:
                log.warning("%s: %s; its last lines may be missing", self.path, error)
            self._stream = None

    def __enter__(self) -> SampleLedger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, record: dict[str, Any]) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning("%s cannot be written (%s); the samples of the next steps are not written down", self.path, error)
        self.close()


def read_ledger(output_dir: str | Path) -> dict[int, LedgerStep]:
    """Read what all ranks wrote, by step of the plan (from 0).

    An attempt begins at a position; what earlier ones did from there on was undone, and does not count. Nor does a line
    that is cut.

    Raises:
        DataError: there is no ledger, or it cannot be read.
    """
    starts: dict[int, tuple[int, int]] = {}  # attempt -> its first step and number of ranks
    steps: dict[int, dict[int, dict[int, dict[str, Any]]]] = {}  # step -> attempt -> rank -> line
    paths = sorted(_directory(output_dir).glob("rank-*.jsonl"))
    if not paths:
        raise DataError(f"{output_dir} has no ledger; set train.sample_ledger=true when you train")
    for path in paths:
        rank = int(path.stem.removeprefix("rank-"))
        for line in _lines(path):
            attempt = line["attempt"]
            if "start_step" in line:
                starts[attempt] = (line["start_step"], line["world_size"])
            elif "step" in line:
                steps.setdefault(line["step"], {}).setdefault(attempt, {})[rank] = line
    ledger: dict[int, LedgerStep] = {}
    for step, attempts in sorted(steps.items()):
        attempt = max(attempts)
        if any(later > attempt and start <= step for later, (start, _) in starts.items()):
            continue
        num_ranks = starts[attempt][1] if attempt in starts else 0
        ledger[step] = _join(attempt, attempts[attempt], num_ranks)
    return ledger


def _join(attempt: int, lines: dict[int, dict[str, Any]], num_ranks: int) -> LedgerStep:
    """One step's lines of all ranks."""
    null_slots: Counter[str] = Counter()
    for line in lines.values():
        null_slots.update(line["null_slots"])
    is_applied = all(line["applied"] for line in lines.values())
    samples = sorted(LedgerSample(*sample) for line in lines.values() for sample in line["samples"])
    missing = tuple(rank for rank in range(num_ranks) if rank not in lines)
    return LedgerStep(attempt, tuple(samples) if is_applied else (), dict(null_slots), is_applied, missing)


def _directory(output_dir: str | Path) -> Path:
    return Path(output_dir) / "ledger"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file; what a kill left of a line is none."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                record = _parse(line)
                if record is not None:
                    yield record
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("attempt"), int) else None


def _last_attempt(output_dir: str | Path) -> int:
    """The highest attempt that any rank has begun, as far as this process sees; 0 without one."""
    last = 0
    for path in _directory(output_dir).glob("rank-*.jsonl"):
        try:
            end = end_of_lines(path)
            begin = end_of_lines(path, end - 1)
            with path.open("rb") as file:
                file.seek(begin)
                line = _parse(file.read(end - begin).decode("utf-8", "replace"))
        except OSError as error:
            log.warning("%s cannot be read (%s); its attempts are not counted", path, error)
            continue
        last = max(last, line["attempt"] if line is not None else 0)
    return last
