"""What a run reports about its steps, with units in the names; docs/metrics.md has every figure's formula."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

GIBIBYTE = 2**30

#: A rank that takes so many times as long as the others is named on the console.
_WORTH_NAMING = 1.2

#: Not in the record where there is no such figure: what reads it asks whether it is there.
_LEFT_OUT = ("mfu", "hfu", "tflops_per_device", "hardware_tflops_per_device", "slowest_rank", "slowest_rank_ratio")


@dataclass(frozen=True)
class SourceMetrics:
    """One source's part of a window.

    Attributes:
        loss: nats per target token of this source; None where it has none.
        token_share: its part of the real tokens.
        target_share: its part of the target tokens, which is its weight in the loss.
    """

    loss: float | None
    token_share: float
    target_share: float


@dataclass(frozen=True)
class StepMetrics:
    """One line of the log: the means over the steps since the line before (the window), over all ranks.

    Attributes:
        step: optimizer updates that are done; the last of the window.
        num_steps: of the whole run.
        epoch: epochs consumed when this step is done.
        loss: nats per target token: the window's sum over its number of target tokens, so that a step with more
            targets weighs more. None where the window has no target token.
        learning_rate: of the window's last step.
        grad_norm: before clipping, of the window's last step; None where that step was not applied.
        tokens_per_second: real tokens (context and target, no padding), over all ranks.
        samples_per_second: over all ranks; null slots don't count.
        padding_share: pad tokens / computed tokens.
        data_wait_share: share of the window's time that a rank waited for its data, mean of the ranks.
        step_seconds: mean wall-clock time of a step; evaluation and checkpoints are not in it.
        num_window_steps: steps in the window.
        num_nonfinite_steps: of them without an update, since the gradient was not finite; not in the loss.
        num_target_tokens: tokens with loss in the window.
        num_reduced: samples of the window whose images or clips were made smaller to fit max_length.
        num_cut: samples of the window whose text was cut at max_length.
        null_slots: slots of the window without a sample, by class.
        host_memory_bytes: resident memory of a rank's process and its workers, now; the largest of the ranks.
        device_memory_bytes: most memory that tensors had on a device in the window; None without CUDA.
        device_reserved_bytes: most memory that the allocator had taken there; None without CUDA.
        tflops_per_device: 10^12 operations per second and device that the samples need; None where they are unknown.
        hardware_tflops_per_device: those that are computed, with padding and what is computed again.
        mfu: tflops_per_device as a share of what the device can do; None where nobody knows that.
        hfu: the same of hardware_tflops_per_device.
        slowest_rank: the one that took longest for its own data and forward passes; None for a single rank.
        slowest_rank_ratio: how many times as long as the median of the ranks.
        learning_rates: of the window's last step, by tower, where they differ.
        sources: parts of the window, where there are several sources.
        eta_seconds: until the end of this run, as far as known.
    """

    step: int
    num_steps: int
    epoch: float
    loss: float | None
    learning_rate: float
    grad_norm: float | None
    tokens_per_second: float
    samples_per_second: float
    padding_share: float
    data_wait_share: float
    step_seconds: float
    num_window_steps: int
    num_target_tokens: int
    num_nonfinite_steps: int = 0
    num_reduced: int = 0
    num_cut: int = 0
    null_slots: Mapping[str, int] = field(default_factory=dict)
    host_memory_bytes: int = 0
    device_memory_bytes: int | None = None
    device_reserved_bytes: int | None = None
    tflops_per_device: float | None = None
    hardware_tflops_per_device: float | None = None
    mfu: float | None = None
    hfu: float | None = None
    slowest_rank: int | None = None
    slowest_rank_ratio: float | None = None
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, SourceMetrics] = field(default_factory=dict)
    eta_seconds: float | None = None

    @property
    def num_skipped(self) -> int:
        """Samples of the window that could not be used."""
        return sum(count for name, count in self.null_slots.items() if name != "tail")

    def as_record(self) -> dict[str, Any]:
        """A flat mapping of name to number or None: `null_slots/<class>`, `learning_rate/<tower>`, `<source>/loss`."""
        record = asdict(self)
        null_slots, rates, sources = (record.pop(name) for name in ("null_slots", "learning_rates", "sources"))
        record = {name: value for name, value in record.items() if value is not None or name not in _LEFT_OUT}
        record["num_skipped"] = self.num_skipped
        record |= {f"null_slots/{name}": count for name, count in null_slots.items()}
        record |= {f"learning_rate/{tower}": rate for tower, rate in rates.items()}
        return record | {f"{name}/{key}": value for name, part in sources.items() for key, value in part.items()}


def describe_step(metrics: StepMetrics) -> str:
    """One line for people."""
    parts = [
        f"step {metrics.step}/{metrics.num_steps}",
        f"epoch {metrics.epoch:.2f}",
        f"loss {figure(metrics.loss, '.4f')}",
        f"lr {metrics.learning_rate:.2e}",
        f"grad norm {figure(metrics.grad_norm, '.3f')}",
        f"{metrics.tokens_per_second:,.0f} tokens/s",
        f"{metrics.samples_per_second:,.1f} samples/s",
        f"{metrics.step_seconds:.2f} s/step",
    ]
    if (speed := describe_utilisation(metrics)) is not None:
        parts.append(speed)
    parts += [
        f"padding {metrics.padding_share:.0%}",
        f"data wait {metrics.data_wait_share:.0%}",
        f"memory {metrics.host_memory_bytes / GIBIBYTE:.1f} GiB",
    ]
    if metrics.device_memory_bytes is not None:
        parts.append(f"device {metrics.device_memory_bytes / GIBIBYTE:.1f} GiB")
    if metrics.slowest_rank_ratio is not None and metrics.slowest_rank_ratio >= _WORTH_NAMING:
        parts.append(f"slowest rank {metrics.slowest_rank} ({metrics.slowest_rank_ratio:.1f}x)")
    fitted = {"reduced": metrics.num_reduced, "cut": metrics.num_cut}
    if any(fitted.values()):
        parts.append("to fit max_length " + " ".join(f"{name}={count}" for name, count in fitted.items() if count))
    if metrics.num_nonfinite_steps:
        parts.append(f"not finite {metrics.num_nonfinite_steps} of {metrics.num_window_steps} steps")
    null_slots = {name: count for name, count in metrics.null_slots.items() if count}
    if null_slots:
        parts.append("null slots " + " ".join(f"{name}={count}" for name, count in null_slots.items()))
    return "  ".join(parts)


def describe_utilisation(metrics: StepMetrics) -> str | None:
    """How well the devices are used, for people; None where nothing is known of it."""
    if metrics.mfu is not None:
        return f"MFU {metrics.mfu:.1%}"
    tflops = metrics.tflops_per_device
    if tflops is None:
        return None
    return f"{tflops:.1f} TFLOP/s" if tflops >= 0.1 else f"{tflops * 1000:.2g} GFLOP/s"


def describe_evaluation(step: int, metrics: Mapping[str, Any]) -> str:
    """One line for people."""
    figures = (f"{name} {figure(value, '.4f')}" for name, value in metrics.items())
    return f"evaluation at step {step}  " + "  ".join(figures)


def figure(value: Any, form: str) -> str:
    """A number in a form, `-` for None, anything else as it is."""
    if value is None:
        return "-"
    if isinstance(value, float) and math.isfinite(value):
        return format(value, form)
    return str(value)
