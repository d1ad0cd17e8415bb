"""What the planner wants to know of a sample: two costs, and with which others it may share a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Costs:
    """Predicted costs of N samples, as columns.

    Attributes:
        tokens: [N] int64, at least 1: tokens of the language model, text and visual, after truncation.
        patches: [N] int64: patches of the vision tower; 0 for text.
        batch_key: [N] int64: samples with different keys never share a micro-batch; 0 where the family mixes all.
    """

    tokens: NDArray[np.int64]
    patches: NDArray[np.int64]
    batch_key: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)


class LengthModel(Protocol):
    """Predicts costs by source and row: a pure function, the same on every rank."""

    @property
    def digest(self) -> str:
        """Hex digest of all that the predictions depend on besides the data; part of the plan's identity."""

    @property
    def mixes_all(self) -> bool:
        """Whether any samples may share a micro-batch: all batch keys are 0."""

    def costs(self, source: int, rows: NDArray[np.int64]) -> Costs:
        """Predict the costs of some rows of the source at this position of the run's sources."""
