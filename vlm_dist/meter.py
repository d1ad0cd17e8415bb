"""Measures the steps of the loop, and brings all ranks' figures together when a line of the log is due.

In steps without a line nothing here asks the device for a value or another rank for anything.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from vlm_dist.data.feed import FeedStep
from vlm_dist.data.types import MicroBatch, StepPlan
from vlm_dist.distributed.group import Ranks
from vlm_dist.engine import DeviceTimer, StepOutcome
from vlm_dist.loss import TokenGroups
from vlm_dist.model.flops import FlopModel, Flops, SampleShare
from vlm_dist.observability.eta import Eta, Pause
from vlm_dist.observability.log import MetricLog
from vlm_dist.observability.window import LineFacts, MetricWindow, StepShare
from vlm_dist.trainer_parts import Cadence

logger = logging.getLogger(__name__)

_UNKNOWN = Flops(float("nan"), float("nan"))


class Meter:
    """Figures of the run, from its steps to its log.

    Args:
        ranks: this process among its peers.
        cadence: when lines are due, and what else takes time.
        log: where they go.
        device: of this rank.
        start: number of steps that are done already.
        sources: names of the training sources, in the order of `SampleRef.source`; told apart where there are several.
        flops: counts operations; None: nobody can.
        peak_flops: operations per second that the device can do; None: unknown.
        tower_factors: tower -> its learning rate as a multiple of the first parameter group's, where they differ.
        timer: of forward passes; None: one that counts all that is in them.
    """

    def __init__(
        self,
        ranks: Ranks,
        cadence: Cadence,
        log: MetricLog,
        device: torch.device,
        *,
        start: int = 0,
        sources: Sequence[str] = (),
        flops: FlopModel | None = None,
        peak_flops: float | None = None,
        tower_factors: Mapping[str, float] | None = None,
        timer: DeviceTimer | None = None,
    ) -> None:
        self.ranks = ranks
        self.cadence = cadence
        self.log = log
        self.device = device
        self.num_sources = len(sources) if len(sources) > 1 else 0
        self.timer = timer or DeviceTimer(device)
        self.window = MetricWindow(sources if self.num_sources else (), peak_flops)
        self._flops = flops
        self._tower_factors = tower_factors or {}
        self._eta = Eta(start, cadence.last_step, cadence.eval_steps, cadence.save_steps)
        self._unreported: tuple[StepPlan, StepOutcome | None] | None = None  # the last step, while it is in no line

    def count(self, micro_batch: MicroBatch) -> Flops:
        """Operations of a micro-batch; what cannot be counted is said once."""
        if self._flops is None:
            return _UNKNOWN
        try:
            needed = SampleShare(tuple(micro_batch.sample_tokens), micro_batch.kinds)
            return self._flops.count(micro_batch.inputs, micro_batch.labels, needed)
        except Exception as error:  # noqa: BLE001 - a figure must not end a run
            logger.warning("operations cannot be counted, so that MFU is left out: %s: %s", type(error).__name__, error)
            self._flops = None
            return _UNKNOWN

    def start_clock(self) -> None:
        """The loop begins now: what came before is no part of its first step."""
        self.window.restart_clock()
        self._eta.restart_clock()

    def add(self, tally: StepTally, fetched: FeedStep, outcome: StepOutcome | None, *, is_finite: bool) -> None:
        """Count a step that is done.

        Args:
            tally: what was added up in it.
            fetched: the step.
            outcome: of its update; None where there was nothing to learn.
            is_finite: False: nothing was updated, as the gradient was not finite.
        """
        self.window.add(share=tally.share(fetched), totals=fetched.verdict.total, is_finite=is_finite)
        self._eta.step_done(fetched.plan.step + 1)
        self._unreported = (fetched.plan, outcome)

    def report(self, position: int) -> None:
        """Log the window where it is due. Collective: every rank calls this after every step."""
        ends_here = position == self.cadence.last_step
        if ends_here or self.cadence.due(position, self.cadence.logging_steps):
            self.report_window(position)
        if self._unreported is not None:
            self.log.advance(position, self._eta.seconds_left())

    def report_window(self, position: int) -> None:
        """Log the steps since the last line, if there are any; the only place that waits for the device. Collective."""
        if self._unreported is None or self.cadence.logging_steps == 0:
            return
        (plan, outcome), self._unreported = self._unreported, None
        rate = outcome.learning_rate if outcome else 0.0
        forward_seconds = self.timer.take()
        row = torch.tensor([self.window.rank_row(forward_seconds)], dtype=torch.float64)
        rows = torch.empty((self.ranks.world_size, row.shape[1]), dtype=torch.float64)
        dist.all_gather_into_tensor(rows, row, group=self.ranks.control)
        facts = LineFacts(
            step=position,
            num_steps=self.cadence.num_steps,
            epoch=plan.epoch,
            learning_rate=rate,
            grad_norm=outcome.grad_norm if outcome else None,
            learning_rates={tower: rate * factor for tower, factor in self._tower_factors.items()},
            eta_seconds=self._eta.seconds_left(),
        )
        self.log.log_step(self.window.flush(rows.tolist(), facts))

    @contextmanager
    def pause(self, kind: Pause) -> Iterator[None]:
        """Something else than steps is done within."""
        with self._eta.pause(kind):
            yield
        self.window.restart_clock()


class StepTally:
    """What this rank adds up during one step; losses stay on the device.

    Args:
        meter: that it is for.

    Attributes:
        losses: of the micro-batches, scalars in nats.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.losses: list[torch.Tensor] = []
        count = meter.num_sources
        self._source_losses = torch.zeros(count, dtype=torch.float32, device=meter.device) if count else None

    @contextmanager
    def forward(self, micro_batch: MicroBatch) -> Iterator[TokenGroups | None]:
        """Around a forward pass; gives what tells the losses of the sources apart, where there are several."""
        groups = None
        if self._source_losses is not None:
            sources = [ref.source for ref in micro_batch.refs]
            groups = TokenGroups.of_samples(sources, micro_batch.sample_targets, self._source_losses)
        with self._meter.timer.measure():
            yield groups

    def share(self, fetched: FeedStep) -> StepShare:
        """This rank's part of the step's figures."""
        loss_sum = torch.zeros((), dtype=torch.float32, device=self._meter.device)
        for loss in self.losses:
            loss_sum = loss_sum + loss
        targets, tokens = ([0] * self._meter.num_sources for _ in range(2))
        flops = Flops(0.0, 0.0)
        for batch in fetched.micro_batches:
            flops += self._meter.count(batch) if self.losses else Flops(0.0, 0.0)  # a skipped step computes nothing
            if self._source_losses is None:
                continue
            for ref, num_targets, num_tokens in zip(batch.refs, batch.sample_targets, batch.sample_tokens, strict=True):
                targets[ref.source] += num_targets
                tokens[ref.source] += num_tokens
        return StepShare(
            loss_sum=loss_sum,
            data_wait_seconds=fetched.data_wait_seconds,
            fetch_seconds=fetched.fetch_seconds,
            model_flops=flops.model,
            hardware_flops=flops.hardware,
            source_losses=self._source_losses,
            source_targets=targets,
            source_tokens=tokens,
        )
