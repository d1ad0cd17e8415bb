"""What the parts of our loop take of a step, each by itself."""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vlm_dist import trainer as loop
from vlm_dist.trainer import Trainer

#: What DeepSpeed's own three calls are in our loop.
_CALLS = "forward, backward, update"


class Parts:
    """Stopwatches in a trainer's parts, from `begin` on; a step costs some microseconds more by them.

    Args:
        trainer: whose loop it is.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._now: dict[str, float] = defaultdict(float)
        self._steps: list[dict[str, float]] = []
        self._bare: list[float] = []
        self._started = 0.0

    def begin(self) -> None:
        """Put the stopwatches in; the first step begins."""
        trainer = self._trainer
        for owner, name, part in (
            (trainer.engine, "loss", _CALLS),
            (trainer.engine, "backward", _CALLS),
            (trainer.engine, "step", _CALLS),
            (loop, "seed_micro_batch", "seed of a micro-batch"),
            (trainer.ranks.progress, "at", "where the run is, for who watches"),
            (trainer.nonfinite, "judge", "whether the step is finite"),
            (trainer.ledger, "record", "ledger of samples"),
            (trainer.meter, "add", "sums of the meter, count of operations"),
            (trainer.meter, "report_window", "a line of the log (one step in ten)"),
            (trainer.log, "advance", "live line"),
            (trainer.garbage, "step_done", "garbage collection (one step in 50)"),
        ):
            if owner is not None:
                setattr(owner, name, self._timed(getattr(owner, name), part))
        self._started = time.perf_counter()

    def end_step(self, bare: float) -> None:
        """A step is over, and was run again.

        Args:
            bare: seconds that a bare loop took for it.
        """
        self._steps.append(dict(self._now))
        self._bare.append(bare)
        self._now.clear()
        self._started = time.perf_counter()

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Time what is done within."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._now[part] += time.perf_counter() - started
            self._now["all"] = time.perf_counter() - self._started

    def microseconds(self) -> dict[str, float]:
        """Part -> of a step, without the first: medians, means of what not every step has; the largest first."""
        steps, bare = self._steps[1:], self._bare[1:]
        if not steps:
            return {}
        found: dict[str, float] = {}
        for part in {part for step in steps for part in step}:
            values = [step.get(part, 0.0) for step in steps]
            found[part] = statistics.fmean(values) if "one step in" in part else statistics.median(values)
        whole, calls = found.pop("all"), found.pop(_CALLS)
        every_step = sum(seconds for part, seconds in found.items() if "one step in" not in part)
        beside = [step[_CALLS] - one for step, one in zip(steps, bare, strict=True)]
        found["around DeepSpeed's three calls"] = statistics.median(beside)
        found["everything else of the loop"] = whole - calls - every_step
        return {part: 1e6 * found[part] for part in sorted(found, key=lambda part: -found[part])}

    def _timed(self, call: Any, part: str) -> Any:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.of(part):
                return call(*args, **kwargs)

        return timed
