"""Parts of a loss: what each group of target tokens adds to the sum, found while the sum is made."""

# Shapes: K positions with a label, G groups

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenGroups:
    """Which group each target token is of, and where the losses of the groups are added up.

    Attributes:
        index: [K] int64, in the order of the labels, row by row.
        sums: [G] float32 in nats; grows in place in the forward, without waiting for the device.
    """

    index: Tensor
    sums: Tensor

    @classmethod
    def of_samples(cls, groups: list[int], num_targets: list[int], sums: Tensor) -> TokenGroups:
        """Groups of a micro-batch's targets, sample by sample.

        Args:
            groups: of each sample.
            num_targets: positions with a label of each sample.
            sums: [G] float32.
        """
        as_indices = torch.tensor([groups, num_targets], dtype=torch.int64)
        return cls(torch.repeat_interleave(*as_indices), sums)

    def on_device(self) -> TokenGroups:
        """The same groups, with the index beside the sums."""
        return replace(self, index=self.index.to(self.sums.device, non_blocking=True))

    def add(self, losses: Tensor, start: int) -> None:
        """Add the losses of some positions.

        Args:
            losses: float32, of the positions from `start` on.
            start: index of the first.
        """
        self.sums.index_add_(0, self.index[start : start + len(losses)], losses.detach())

    def spread(self, carries: Tensor) -> TokenGroups:
        """The same groups, indexed by all positions, of which those without a label have no loss.

        Args:
            carries: [N] bool, true at K positions.
        """
        index = torch.zeros(carries.shape, dtype=torch.int64, device=carries.device)
        # masked_scatter_, unlike an assignment, does not ask the device how many there are
        index.masked_scatter_(carries, self.index.to(carries.device, non_blocking=True))
        return replace(self, index=index)
