"""Sums over the steps between two lines of the log.

Nothing here waits for the device before the window is read: the losses are summed where they are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlm_dist.observability.memory import DeviceMemory, device_memory, host_memory_bytes
from vlm_dist.observability.metrics import SourceMetrics, StepMetrics

if TYPE_CHECKING:
    from torch import Tensor

NULL_PREFIX = "null_"

#: What a rank tells the others of its window; three numbers per source follow.
_OWN = (
    *("loss_sum", "data_wait_seconds", "busy_seconds", "model_flops", "hardware_flops", "peak_flops"),
    *("host_bytes", "device_bytes", "reserved_bytes"),
)


@dataclass(frozen=True)
class StepShare:
    """What one rank contributes to the figures of a step.

    Attributes:
        loss_sum: scalar, nats, of this rank; stays on its device.
        data_wait_seconds: how long this rank waited for the step's data, and for the other ranks to have theirs.
        fetch_seconds: how long it waited for its own data.
        model_flops: operations that its samples need; NaN where they are not known.
        hardware_flops: operations that are computed for them.
        source_losses: [S] nats, of each source; stays on its device. None: they are not told apart.
        source_targets: [S] target tokens.
        source_tokens: [S] real tokens.
    """

    loss_sum: Tensor
    data_wait_seconds: float
    fetch_seconds: float = 0.0
    model_flops: float = float("nan")
    hardware_flops: float = float("nan")
    source_losses: Tensor | None = None
    source_targets: Sequence[int] = ()
    source_tokens: Sequence[int] = ()


@dataclass(frozen=True)
class LineFacts:
    """What a line of the log tells besides the sums.

    Attributes:
        step: optimizer updates that are done.
        num_steps: of the whole run.
        epoch: epochs consumed.
        learning_rate: of the last step.
        grad_norm: of the last step, before clipping.
        learning_rates: of the last step, by tower, where they differ.
        eta_seconds: until the run ends, as far as known.
    """

    step: int
    num_steps: int
    epoch: float
    learning_rate: float
    grad_norm: float | None
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    eta_seconds: float | None = None


class MetricWindow:
    """Adds up steps, and turns the sums into `StepMetrics` when a line is due.

    The clock runs from one step to the next; `restart_clock` leaves out what was done between them (evaluation,
    checkpoints).

    Args:
        sources: names of the sources whose parts are told apart; the same on all ranks.
        peak_flops: operations per second that this rank's device can do; None: unknown.
    """

    def __init__(self, sources: Sequence[str] = (), peak_flops: float | None = None) -> None:
        self._sources = tuple(sources)
        self._peak_flops = peak_flops
        self._mark = time.perf_counter()
        self._empty()

    def _empty(self) -> None:
        self._num_steps = 0
        self._num_nonfinite = 0
        self._seconds = 0.0
        self._data_wait_seconds = 0.0
        self._fetch_seconds = 0.0
        self._model_flops = 0.0
        self._hardware_flops = 0.0
        self._loss_sum: Any = 0.0
        self._source_losses: Any = None
        self._source_targets = [0] * len(self._sources)
        self._source_tokens = [0] * len(self._sources)
        self._totals: dict[str, int] = {}

    def add(self, *, share: StepShare, totals: Mapping[str, int], is_finite: bool = True) -> None:
        """Count one step.

        Args:
            share: of this rank.
            totals: counts of the step over all ranks: num_target_tokens, num_tokens, num_computed_tokens,
                num_samples and null_<class>; others are ignored.
            is_finite: False: nothing was updated, since the gradient was not finite; counted apart, and neither its
                loss nor its targets are in the window's.
        """
        self._tick()
        self._num_steps += 1
        if is_finite:
            # float64, for a window may have thousands of steps; added on the device, without waiting for it
            self._loss_sum = self._loss_sum + share.loss_sum.detach().double()
            if share.source_losses is not None:
                losses = share.source_losses.double()
                self._source_losses = losses if self._source_losses is None else self._source_losses + losses
            self._source_targets = _plus(self._source_targets, share.source_targets)
        else:
            self._num_nonfinite += 1
            totals = {name: count for name, count in totals.items() if name != "num_target_tokens"}
        self._source_tokens = _plus(self._source_tokens, share.source_tokens)
        self._data_wait_seconds += share.data_wait_seconds
        self._fetch_seconds += share.fetch_seconds
        self._model_flops += share.model_flops
        self._hardware_flops += share.hardware_flops
        for name, count in totals.items():
            self._totals[name] = self._totals.get(name, 0) + count

    def rank_row(self, forward_seconds: float = 0.0) -> list[float]:
        """What every rank has to know of this one before `flush`. Waits for the device.

        Args:
            forward_seconds: that the device of this rank was busy with forward passes of the window.
        """
        loss_sum = float(self._loss_sum)
        num_sources = len(self._sources)
        losses = [0.0] * num_sources if self._source_losses is None else self._source_losses.tolist()
        self._tick()
        device = device_memory() or DeviceMemory(-1, -1)
        own = (
            *(loss_sum, self._data_wait_seconds, self._fetch_seconds + forward_seconds),
            *(self._model_flops, self._hardware_flops, self._peak_flops or 0.0),
            *(float(host_memory_bytes()), float(device.allocated), float(device.reserved)),
        )
        return [*own, *losses, *map(float, self._source_targets), *map(float, self._source_tokens)]

    def flush(self, rows: Sequence[Sequence[float]], facts: LineFacts) -> StepMetrics:
        """Make the line of this window and begin the next one.

        Args:
            rows: `rank_row` of every rank, in rank order.
            facts: what else the line tells.
        """
        columns = dict(zip(_OWN, zip(*rows, strict=True), strict=False))
        sums = {name: sum(values) for name, values in columns.items()}
        seconds = max(self._seconds, 1e-9)
        num_targets = self._totals.get("num_target_tokens", 0)
        num_tokens = self._totals.get("num_tokens", 0)
        num_computed = self._totals.get("num_computed_tokens", 0)
        speeds = [sums[name] / len(rows) / seconds for name in ("model_flops", "hardware_flops")]
        tflops, hardware_tflops = (speed / 1e12 if speed > 0 else None for speed in speeds)
        # a device of unknown speed leaves the share of all of them unknown
        peak = sums["peak_flops"] / len(rows) / 1e12 if all(columns["peak_flops"]) else None
        slowest, ratio = _slowest(columns["busy_seconds"])
        device_bytes, reserved_bytes = max(columns["device_bytes"]), max(columns["reserved_bytes"])
        metrics = StepMetrics(
            step=facts.step,
            num_steps=facts.num_steps,
            epoch=facts.epoch,
            loss=sums["loss_sum"] / num_targets if num_targets else None,
            learning_rate=facts.learning_rate,
            grad_norm=facts.grad_norm,
            tokens_per_second=num_tokens / seconds,
            samples_per_second=self._totals.get("num_samples", 0) / seconds,
            padding_share=1 - num_tokens / num_computed if num_computed else 0.0,
            data_wait_share=min(1.0, sums["data_wait_seconds"] / len(rows) / seconds),
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
            host_memory_bytes=int(max(columns["host_bytes"])),
            device_memory_bytes=int(device_bytes) if device_bytes >= 0 else None,
            device_reserved_bytes=int(reserved_bytes) if reserved_bytes >= 0 else None,
            tflops_per_device=tflops,
            hardware_tflops_per_device=hardware_tflops,
            mfu=tflops / peak if tflops and peak else None,
            hfu=hardware_tflops / peak if hardware_tflops and peak else None,
            slowest_rank=slowest,
            slowest_rank_ratio=ratio,
            learning_rates=facts.learning_rates,
            sources=self._source_metrics(rows),
            eta_seconds=facts.eta_seconds,
        )
        self._empty()
        return metrics

    def restart_clock(self) -> None:
        """Leave out the time since the last step."""
        self._mark = time.perf_counter()

    def _source_metrics(self, rows: Sequence[Sequence[float]]) -> dict[str, SourceMetrics]:
        totals = [sum(values) for values in zip(*(row[len(_OWN) :] for row in rows), strict=True)]
        count = len(self._sources)
        losses, targets, tokens = (totals[i * count : (i + 1) * count] for i in range(3))
        all_targets, all_tokens = max(sum(targets), 1), max(sum(tokens), 1)
        return {
            name: SourceMetrics(
                loss=losses[i] / targets[i] if targets[i] else None,
                token_share=tokens[i] / all_tokens,
                target_share=targets[i] / all_targets,
            )
            for i, name in enumerate(self._sources)
        }

    def _tick(self) -> None:
        now = time.perf_counter()
        self._seconds += now - self._mark
        self._mark = now


def _slowest(seconds: Sequence[float]) -> tuple[int | None, float | None]:
    """The rank that took longest, and how many times the median; of two ranks, of the other one."""
    median = statistics.median_low(seconds)
    if len(seconds) < 2 or median <= 0:
        return None, None
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    return slowest, seconds[slowest] / median


def _plus(left: Sequence[int], right: Sequence[int]) -> list[int]:
    """Sums of pairs; an empty right side is nothing."""
    return [a + b for a, b in zip(left, right, strict=True)] if right else list(left)
