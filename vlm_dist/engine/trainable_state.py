"""What a training run must not lose, by parameter name: independent of ZeRO stage and number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class NamedState:
    """One trainable parameter: float32 tensors on the CPU, of the parameter's shape; or a run of its elements."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(frozen=True)
class TrainableState:
    """All trainable parameters and the optimizer.

    Attributes:
        step: number of updates that the optimizer applied.
        parameters: by the name that `named_parameters` of the model gives.
        hyperparameters: of the optimizer's groups, in order: learning rate, betas, eps, weight decay.
        loss_scaler: float16 only: the dynamic loss scale and its counters.
    """

    step: int
    parameters: Mapping[str, NamedState]
    hyperparameters: list[dict[str, Any]] = field(default_factory=list)
    loss_scaler: dict[str, float] = field(default_factory=dict)

    @property
    def num_elements(self) -> int:
        """Number of trainable elements."""
        return sum(state.master.numel() for state in self.parameters.values())
