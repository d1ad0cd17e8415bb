"""Plans steps a little before they are needed, and tells the sources what will be read."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from vlm_dist.data.plan.plan import Plan
from vlm_dist.data.types import SampleRef, Source, StepPlan

log = logging.getLogger(__name__)

#: So many steps more than are taken: a run begins at once, and is ahead after a few steps.
_PLANNED_AT_ONCE = 2


class Lookahead:
    """Gives out the steps of a plan in their order, each planned once.

    Args:
        plan: of the run.
        sources: of the plan; told which rows this rank's steps will read, each step once, in their order.
        rank: of this process.
        world_size: number of ranks.
        num_steps: how far ahead of the step that is taken.
    """

    def __init__(self, plan: Plan, sources: Sequence[Source], rank: int, world_size: int, num_steps: int) -> None:
        self._plan = plan
        self._sources = sources
        self._rank = rank
        self._world_size = world_size
        self._num_steps = num_steps
        self._ahead: deque[StepPlan] = deque()

    def take(self, index: int) -> StepPlan:
        """Return a step; the indexes of one call after the other follow each other."""
        if self._ahead and self._ahead[0].step == index:
            return self._ahead.popleft()
        self._ahead.clear()
        return self._plan_and_tell(index)

    def look_ahead(self, index: int) -> None:
        """Plan a few of the steps that come after one."""
        for _ in range(_PLANNED_AT_ONCE):
            following = self._ahead[-1].step + 1 if self._ahead else index + 1
            if following > index + self._num_steps or following >= self._plan.num_steps:
                return
            try:
                self._ahead.append(self._plan_and_tell(following))
            except Exception as error:  # noqa: BLE001 - met again, and voted on, when the step's turn comes
                log.debug("step %d cannot be planned ahead: %r", following, error)
                return

    def _plan_and_tell(self, index: int) -> StepPlan:
        step = self._plan.step(index)
        jobs = step.for_rank(self._rank, self._world_size)
        announce(self._sources, (ref for job in jobs for ref in job.refs))
        return step


def announce(sources: Sequence[Source], refs: Iterable[SampleRef | None]) -> None:
    """Tell the sources which samples will be read, in this order."""
    rows: dict[int, list[int]] = {}
    for ref in refs:
        if ref is not None and ref.source < len(sources):
            rows.setdefault(ref.source, []).append(ref.index)
    for source, wanted in rows.items():
        sources[source].will_read(np.array(wanted, dtype=np.int64))
