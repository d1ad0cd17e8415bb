"""What becomes of a run whose gradient is not finite: named, counted, skipped or ended, on all ranks alike.

A step that is not applied uses up its samples, and changes nothing else: no weight, no moment, no learning rate. What
follows is what would have followed had the step not been in the plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from vlm_dist.data.types import MicroBatch
from vlm_dist.distributed.group import Ranks
from vlm_dist.engine.outcome import StepOutcome
from vlm_dist.errors import DivergedError

Action = Literal["skip", "fail"]

_NUM_SHOWN = 3
_ADVICE = (
    "The run has diverged, or a sample or the model is broken: lower train.learning_rate (or lengthen the warm-up), "
    "set train.max_grad_norm, and go on from a checkpoint of before (train.resume=<path>); in float16 try bf16"
)


class NonfiniteSteps:
    """Judges every step that was not applied. In float16 a step that only lowers the loss scale is no such step.

    Args:
        action: skip: go on with the next step; fail: end the run at the first.
        max_in_a_row: so many of them one after the other end the run all the same.
        ranks: this process among its peers.
        report: where messages go.
        tower_of: a parameter's name -> the tower it belongs to.

    Attributes:
        count: steps that were not applied since the start of this process.
    """

    def __init__(
        self,
        action: Action,
        max_in_a_row: int,
        ranks: Ranks,
        report: Callable[[str], None],
        tower_of: Callable[[str], str] = lambda name: "model",
    ) -> None:
        self._action = action
        self._max_in_a_row = max_in_a_row
        self._ranks = ranks
        self._report = report
        self._tower_of = tower_of
        self._in_a_row = 0
        self.count = 0

    def judge(
        self, step: int, outcome: StepOutcome, losses: Sequence[Tensor], micro_batches: Sequence[MicroBatch]
    ) -> bool:
        """Look at a step that is done. Collective where it was not applied, which all ranks know alike.

        Args:
            step: its position, from 1.
            outcome: of the engine.
            losses: of this rank's micro-batches, scalars.
            micro_batches: of this rank, in the same order.

        Returns:
            Whether the step was not finite.

        Raises:
            DivergedError: on every rank: the run is to end. Weights and moments are those before the step.
        """
        if outcome.applied:
            self._in_a_row = 0
            return False
        mine = (outcome.nonfinite_parameters, _bad_batches(losses, micro_batches))
        by_rank = self._ranks.gather_objects(mine)
        is_loss_finite = not any(bad for _, bad in by_rank)
        if outcome.is_scale_search and is_loss_finite:
            self._report(f"step {step}: overflow in float16; the loss scale was lowered, nothing was updated")
            return False
        self._in_a_row += 1
        self.count += 1
        parameters = {name for names, _ in by_rank for name in names}
        told = f"step {step}: {self._describe(parameters, [bad for _, bad in by_rank])}"
        if self._action == "fail":
            raise DivergedError(f"{told}; train.nonfinite_steps is fail. {_ADVICE}")
        if self._in_a_row >= self._max_in_a_row:
            raise DivergedError(
                f"{told}; it is the {_ordinal(self._in_a_row)} step in a row, and train.max_nonfinite_steps is "
                f"{self._max_in_a_row}. {_ADVICE}"
            )
        self._report(f"{told}; nothing was updated ({self._in_a_row} in a row, {self.count} since the start)")
        return True

    def _describe(self, parameters: set[str], bad_by_rank: Sequence[Sequence[str]]) -> str:
        towers = Counter(self._tower_of(name) for name in parameters)
        counts = ", ".join(f"{tower} {count}" for tower, count in sorted(towers.items()))
        which = f" of {len(parameters)} parameters ({counts}; e.g. {min(parameters)})" if parameters else ""
        text = f"the gradient{which} is not finite"
        bad = [f"rank {rank}: {line}" for rank, lines in enumerate(bad_by_rank) for line in lines]
        if not bad:
            return f"{text}, though every loss is"
        more = f" and {len(bad) - _NUM_SHOWN} more" if len(bad) > _NUM_SHOWN else ""
        return f"{text}, since losses are not: {'; '.join(bad[:_NUM_SHOWN])}{more}"


def _bad_batches(losses: Sequence[Tensor], micro_batches: Sequence[MicroBatch]) -> list[str]:
    """Each micro-batch whose loss is not finite: its number, its loss, its samples."""
    if not losses:
        return []
    values = torch.stack([loss.detach().float() for loss in losses]).tolist()
    lines = []
    for value, batch in zip(values, micro_batches, strict=True):
        if not -float("inf") < value < float("inf"):
            samples = ", ".join(str(origin) for origin in batch.origins) or "no sample"
            lines.append(f"micro-batch {batch.job.micro_batch} has the loss {value} ({samples})")
    return lines


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
