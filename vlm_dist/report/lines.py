"""Lines of `metrics.jsonl` as columns of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Lines:
    """Records as columns, in the order of the file; NaN where a record has no such number.

    Args:
        records: with `step`; those without are left out and counted.

    Attributes:
        step: steps that were done, [N].
        num_odd: records that were left out.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        steps: list[int] = []
        found: dict[str, tuple[list[int], list[float]]] = {}
        self.num_odd = 0
        for record in records:
            step = record.get("step")
            if type(step) is not int or not 0 <= step < 2**53:
                self.num_odd += 1
                continue
            row = len(steps)
            steps.append(step)
            for name, value in record.items():
                number = parse_time(value) if name == "time" else as_number(value)
                if number is not None:
                    rows, numbers = found.setdefault(name, ([], []))
                    rows.append(row)
                    numbers.append(number)
        self.step: NDArray[np.int64] = np.asarray(steps, dtype=np.int64)
        self._columns: dict[str, Floats] = {}
        for name, (rows, numbers) in found.items():
            column = np.full(len(steps), np.nan)
            column[rows] = numbers
            self._columns[name] = column

    def __len__(self) -> int:
        return len(self.step)

    @property
    def names(self) -> list[str]:
        """Of all columns that have a number, in the order of their first appearance."""
        return list(self._columns)

    def __getitem__(self, name: str) -> Floats:
        """A column, [N]; all NaN where no record has it."""
        column = self._columns.get(name)
        return np.full(len(self), np.nan) if column is None else column

    def has(self, name: str) -> bool:
        """Whether any record has a number of that name."""
        return name in self._columns and bool(np.isfinite(self._columns[name]).any())

    @property
    def window_steps(self) -> Floats:
        """Steps that each line stands for, [N]; where it does not say, those since the line before."""
        since = np.diff(self.step, prepend=0).astype(float)
        told = self["num_window_steps"]
        return np.where(np.isfinite(told), told, np.maximum(since, 1))

    @property
    def window_seconds(self) -> Floats:
        """Time in steps that each line stands for, [N]; 0 where it does not say."""
        return np.nan_to_num(self["step_seconds"] * self.window_steps)

    def last(self, name: str) -> float | None:
        """The last number of a column."""
        column = self[name]
        finite = column[np.isfinite(column)]
        return float(finite[-1]) if len(finite) else None

    def best(self, name: str, greatest: bool = False) -> float | None:
        """The smallest or the greatest number of a column."""
        column = self[name]
        finite = column[np.isfinite(column)]
        return None if not len(finite) else float(finite.max() if greatest else finite.min())

    def mean(self, name: str) -> float | None:
        """The mean of a column over the time in steps."""
        column, weights = self[name], self.window_seconds
        if not weights.any():
            weights = np.ones(len(self))
        chosen = np.isfinite(column) & (weights > 0)
        return float(np.average(column[chosen], weights=weights[chosen])) if chosen.any() else None


def as_number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    if type(value) not in (int, float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def parse_time(value: Any) -> float | None:
    """Seconds since 1970 of a time as our files have it; None where it is none."""
    try:
        return datetime.fromisoformat(value).timestamp()
    except (ValueError, TypeError, OverflowError, OSError):
        return None
