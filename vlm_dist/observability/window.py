"""Sums over the steps between two lines of the log.

Nothing here waits for the device before the window is read: the loss is summed where it is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlm_dist.observability.memory import device_memory_bytes, host_memory_bytes
from vlm_dist.observability.metrics import StepMetrics

if TYPE_CHECKING:
    from torch import Tensor

NULL_PREFIX = "null_"


class MetricWindow:
    """Adds up steps, and turns the sums into `StepMetrics` when a line is due.

    The clock runs from one step to the next; `restart_clock` leaves out what was done between them (evaluation,
    checkpoints).
    """

    def __init__(self) -> None:
        self._mark = time.perf_counter()
        self._empty()

    def _empty(self) -> None:
        self._num_steps = 0
        self._num_nonfinite = 0
        self._seconds = 0.0
        self._data_wait_seconds = 0.0
        self._loss_sum: Any = 0.0
        self._totals: dict[str, int] = {}

    def add(
        self, *, loss_sum: Tensor, totals: Mapping[str, int], data_wait_seconds: float, is_finite: bool = True
    ) -> None:
        """Count one step.

        Args:
            loss_sum: scalar, nats, of this rank; stays on its device.
            totals: counts of the step over all ranks: num_target_tokens, num_tokens, num_computed_tokens,
                num_samples and null_<class>; others are ignored.
            data_wait_seconds: how long this rank waited for the step's data.
            is_finite: False: nothing was updated, since the gradient was not finite; counted apart, and neither its
                loss nor its targets are in the window's.
        """
        self._tick()
        self._num_steps += 1
        if is_finite:
            # float64, for a window may have thousands of steps; added on the device, without waiting for it
            self._loss_sum = self._loss_sum + loss_sum.detach().double()
        else:
            self._num_nonfinite += 1
            totals = {name: count for name, count in totals.items() if name != "num_target_tokens"}
        self._data_wait_seconds += data_wait_seconds
        for name, count in totals.items():
            self._totals[name] = self._totals.get(name, 0) + count

    def rank_sums(self) -> list[float]:
        """What has to be summed over the ranks before `flush`. Waits for the device."""
        sums = [float(self._loss_sum), self._data_wait_seconds]
        self._tick()
        return sums

    def flush(
        self,
        *,
        sums: Sequence[float],
        world_size: int,
        step: int,
        num_steps: int,
        epoch: float,
        learning_rate: float,
        grad_norm: float | None,
    ) -> StepMetrics:
        """Make the line of this window and begin the next one.

        Args:
            sums: `rank_sums`, summed over the ranks.
            world_size: number of ranks.
            step: optimizer updates that are done.
            num_steps: of the whole run.
            epoch: epochs consumed.
            learning_rate: of the last step.
            grad_norm: of the last step, before clipping.
        """
        loss_sum, data_wait_seconds = sums
        seconds = max(self._seconds, 1e-9)
        num_targets = self._totals.get("num_target_tokens", 0)
        num_tokens = self._totals.get("num_tokens", 0)
        num_computed = self._totals.get("num_computed_tokens", 0)
        metrics = StepMetrics(
            step=step,
            num_steps=num_steps,
            epoch=epoch,
            loss=loss_sum / num_targets if num_targets else None,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens_per_second=num_tokens / seconds,
            samples_per_second=self._totals.get("num_samples", 0) / seconds,
            padding_share=1 - num_tokens / num_computed if num_computed else 0.0,
            data_wait_share=min(1.0, data_wait_seconds / world_size / seconds),
            step_seconds=self._seconds / max(self._num_steps, 1),
            num_window_steps=self._num_steps,
            num_nonfinite_steps=self._num_nonfinite,
            num_target_tokens=num_targets,
            num_reduced=self._totals.get("num_reduced", 0),
            num_cut=self._totals.get("num_cut", 0),
            null_slots={
                name.removeprefix(NULL_PREFIX): count
                for name, count in self._totals.items()
                if name.startswith(NULL_PREFIX)
            },
            host_memory_bytes=host_memory_bytes(),
            device_memory_bytes=device_memory_bytes(),
        )
        self._empty()
        return metrics

    def restart_clock(self) -> None:
        """Leave out the time since the last step."""
        self._mark = time.perf_counter()

    def _tick(self) -> None:
        now = time.perf_counter()
        self._seconds += now - self._mark
        self._mark = now
