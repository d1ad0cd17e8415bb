"""What a run reports about its steps, with units in the names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

GIBIBYTE = 2**30


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
        host_memory_bytes: resident memory of rank 0's process and its workers, now.
        device_memory_bytes: most memory of rank 0's device that tensors had in the window; None without CUDA.
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

    def as_record(self) -> dict[str, Any]:
        """A flat mapping of name to number or None; null slots become `null_slots/<class>`."""
        record = asdict(self)
        null_slots = record.pop("null_slots")
        return record | {f"null_slots/{name}": count for name, count in null_slots.items()}


def describe_step(metrics: StepMetrics) -> str:
    """One line for people."""
    parts = [
        f"step {metrics.step}/{metrics.num_steps}",
        f"epoch {metrics.epoch:.2f}",
        f"loss {_figure(metrics.loss, '.4f')}",
        f"lr {metrics.learning_rate:.2e}",
        f"grad norm {_figure(metrics.grad_norm, '.3f')}",
        f"{metrics.tokens_per_second:,.0f} tokens/s",
        f"{metrics.samples_per_second:,.1f} samples/s",
        f"{metrics.step_seconds:.2f} s/step",
        f"padding {metrics.padding_share:.0%}",
        f"data wait {metrics.data_wait_share:.0%}",
        f"memory {metrics.host_memory_bytes / GIBIBYTE:.1f} GiB",
    ]
    if metrics.device_memory_bytes is not None:
        parts.append(f"device {metrics.device_memory_bytes / GIBIBYTE:.1f} GiB")
    fitted = {"reduced": metrics.num_reduced, "cut": metrics.num_cut}
    if any(fitted.values()):
        parts.append("to fit max_length " + " ".join(f"{name}={count}" for name, count in fitted.items() if count))
    if metrics.num_nonfinite_steps:
        parts.append(f"not finite {metrics.num_nonfinite_steps} of {metrics.num_window_steps} steps")
    null_slots = {name: count for name, count in metrics.null_slots.items() if count}
    if null_slots:
        parts.append("null slots " + " ".join(f"{name}={count}" for name, count in null_slots.items()))
    return "  ".join(parts)


def describe_evaluation(step: int, metrics: Mapping[str, Any]) -> str:
    """One line for people."""
    figures = (f"{name} {_figure(value, '.4f')}" for name, value in metrics.items())
    return f"evaluation at step {step}  " + "  ".join(figures)


def _figure(value: Any, form: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and math.isfinite(value):
        return format(value, form)
    return str(value)
