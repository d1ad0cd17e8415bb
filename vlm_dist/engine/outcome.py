"""What became of an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepOutcome:
    """What became of an optimizer step; the same on every rank.

    Attributes:
        applied: False if the gradient was not finite: no parameter, moment or learning rate has changed.
        learning_rate: that the step used, of the first parameter group.
        raw_grad_norm: the norm as DeepSpeed has it, maybe on the device.
        nonfinite_parameters: where it was not applied: names of which this rank's share of the gradient is not finite;
            not the same on every rank.
        is_scale_search: where it was not applied: float16's loss scale was too large, and is lower now.
    """

    applied: bool
    learning_rate: float
    raw_grad_norm: Tensor | float | None = None
    nonfinite_parameters: tuple[str, ...] = ()
    is_scale_search: bool = False

    @property
    def grad_norm(self) -> float | None:
        """L2 norm of the whole gradient before clipping; None if it is not finite. Waits for the device."""
        if not self.applied or self.raw_grad_norm is None:
            return None
        return float(self.raw_grad_norm)
