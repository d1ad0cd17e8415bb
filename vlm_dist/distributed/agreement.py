"""The one agreement per step: what every rank found while it made its micro-batches, known to all ranks.

It is an asynchronous all-gather of a few CPU integers, started as soon as a step's micro-batches are collated, and
waited for just before the step's first forward. With it a rank that cannot go on does not raise (the others would wait
in the next collective): it votes, and all ranks leave together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from vlm_dist.distributed.group import LostPeerError
from vlm_dist.errors import DistributedError


@dataclass(frozen=True)
class Verdict:
    """All ranks' votes on one step; the same on every rank."""

    step: int
    per_rank: Mapping[str, list[int]]

    @property
    def total(self) -> dict[str, int]:
        """Sum over the ranks, per field."""
        return {name: sum(values) for name, values in self.per_rank.items()}

    def ranks_with(self, field: str) -> list[int]:
        """The ranks whose value of this field is not zero."""
        return [rank for rank, value in enumerate(self.per_rank[field]) if value]


class Pending:
    """An agreement under way."""

    def __init__(self, step: int, fields: Sequence[str], gathered: torch.Tensor, work: dist.Work | None) -> None:
        self._step = step
        self._fields = fields
        self._gathered = gathered
        self._work = work

    def wait(self) -> Verdict:
        """Block until every rank has voted on this step.

        Raises:
            DistributedError: a rank is gone, or the ranks are not at the same step.
        """
        if self._work is not None:
            try:
                self._work.wait()
            except RuntimeError as error:
                raise LostPeerError(
                    f"step {self._step}: another rank is gone or did not vote in time ({error}); its own log says why"
                ) from error
        rows = self._gathered.tolist()
        steps = [row[0] for row in rows]
        if len(set(steps)) != 1:
            raise DistributedError(f"the ranks are at different steps: {steps}; this is a bug, please report it")
        return Verdict(self._step, {name: [row[i + 1] for row in rows] for i, name in enumerate(self._fields)})


class StepAgreement:
    """Votes on steps over a gloo group of its own.

    Args:
        fields: names of the integers that every vote carries, in the same order on every rank.
        group: a gloo group that nothing else uses; None without peers.
        world_size: number of ranks.
    """

    def __init__(self, fields: Sequence[str], group: dist.ProcessGroup | None = None, world_size: int = 1) -> None:
        self.fields = tuple(fields)
        self._group = group
        self._world_size = world_size

    def vote(self, step: int, counts: Mapping[str, int]) -> Pending:
        """Start the agreement on a step. Collective: every rank calls this once per step, in step order.

        Args:
            step: the step that is voted on.
            counts: one integer per field; a missing field counts as 0, an unknown one is refused.
        """
        unknown = set(counts) - set(self.fields)
        if unknown:
            raise ValueError(f"unknown fields in a vote: {sorted(unknown)}")
        row = torch.tensor([[step, *(int(counts.get(name, 0)) for name in self.fields)]], dtype=torch.int64)
        if self._world_size == 1:
            return Pending(step, self.fields, row, None)
        gathered = torch.empty((self._world_size, row.shape[1]), dtype=torch.int64)
        work = dist.all_gather_into_tensor(gathered, row, group=self._group, async_op=True)
        return Pending(step, self.fields, gathered, work)
