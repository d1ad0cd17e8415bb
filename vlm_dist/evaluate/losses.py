"""The loss of held-out samples, and what was counted on the way."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.types import MicroBatch
from vlm_dist.evaluate.generation import learned_ends

if TYPE_CHECKING:
    from vlm_dist.engine import Engine


@dataclass
class LossTally:
    """What was found in one source, by one rank or by all.

    Attributes:
        losses: of each micro-batch, the sum in nats.
        num_targets: tokens with loss.
        num_samples: that were used.
        num_skipped: that could not be read, or did not fit.
        ends: special tokens that labels end with.
    """

    losses: list[float] = field(default_factory=list)
    num_targets: int = 0
    num_samples: int = 0
    num_skipped: int = 0
    ends: set[int] = field(default_factory=set)

    def figures(self) -> dict[str, float]:
        """The loss in nats per target token, and the counts."""
        # exact, so that it does not depend on which rank had which
        loss = math.fsum(self.losses) / self.num_targets if self.num_targets else math.nan
        return {"loss": loss, "num_samples": self.num_samples, "num_skipped": self.num_skipped}

    @classmethod
    def sum(cls, tallies: Iterable[LossTally]) -> LossTally:
        """Of several ranks, or of several sources."""
        total = cls()
        for tally in tallies:
            total.losses += tally.losses
            total.num_targets += tally.num_targets
            total.num_samples += tally.num_samples
            total.num_skipped += tally.num_skipped
            total.ends |= tally.ends
        return total


def measure_loss(
    engine: Engine,
    batches: Iterable[MicroBatch],
    ignore_index: int,
    special_ids: Collection[int],
    position: int,
    quarantine: Quarantine | None,
) -> LossTally:
    """Run this rank's micro-batches of one source.

    Args:
        engine: holds the model.
        batches: with labels.
        ignore_index: the label of tokens without loss.
        special_ids: that labels may end with.
        position: of the run, for the quarantine.
        quarantine: where samples that could not be used are written down.
    """
    tally = LossTally()
    sums: list[Tensor] = []  # on the device until the end, so that nothing waits for it
    for batch in batches:
        with engine.head.giving_loss(batch.labels, ignore_index):
            outputs = engine.module(**on_device(engine, batch.inputs), use_cache=False)
        sums.append(outputs["loss"])
        tally.num_targets += batch.num_target_tokens
        tally.ends |= learned_ends(batch.labels, special_ids, ignore_index)
        tally.num_samples += batch.num_samples
        tally.num_skipped += sum(slot.null_class != "tail" for slot in batch.null_slots)
        if quarantine is not None:
            quarantine.record(position, [slot for slot in batch.null_slots if slot.origin is not None], "eval")
    tally.losses = [float(value) for value in sums]
    return tally


def on_device(engine: Engine, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs as the model takes them."""
    device, dtype = engine.device, engine.compute_dtype
    return {
        name: value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }
