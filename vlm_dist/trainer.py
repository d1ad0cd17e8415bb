"""The loop. A step fetches its micro-batches, counts their targets, runs them, updates, reports, evaluates, saves.

Step `i` (from 0) is the i-th optimizer update; "position" is the number of steps that are done. The loop knows
nothing of files, processes or DeepSpeed: it is given parts that do.
"""

from __future__ import annotations

from typing import Any

import torch

from vlm_dist.data.feed import FeedStep, StepFeed
from vlm_dist.data.types import IGNORE_INDEX
from vlm_dist.distributed.group import Ranks
from vlm_dist.distributed.signals import AskedToStop, describe_stop
from vlm_dist.engine import Engine, GarbageCollection, NonfiniteSteps, StepOutcome
from vlm_dist.errors import DataError, DivergedError
from vlm_dist.meter import Meter, StepTally
from vlm_dist.observability.log import MetricLog
from vlm_dist.trainer_parts import (
    NOTHING_OWED,
    Cadence,
    Ending,
    Evaluates,
    Explains,
    LosesPatience,
    Owed,
    Profiles,
    Records,
    Saves,
    unexplained,
    unprofiled,
)

_NUM_EXAMPLES = 3


def seed_micro_batch(seed: int, step: int, micro_batch: int) -> None:
    """Make what is random in a forward a function of the plan alone, so that no random state has to be saved.

    Args:
        seed: of the run.
        step: of the plan.
        micro_batch: index in the step over all ranks; the same micro-batch has the same dropout on any rank.
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + micro_batch * 0x94D049BB133111EB) % 2**63
    # not torch.manual_seed: for each kind of device that is not in use it writes down the whole call stack, 0.1-0.2 ms
    torch.default_generator.manual_seed(mixed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(mixed)


class Trainer:
    """Runs the plan from a position to its end.

    Args:
        engine: model and optimizer.
        feed: yields the steps from `start` on, agreed by all ranks.
        ranks: this process among its peers.
        cadence: when to log, evaluate, save and end.
        log: where figures and messages go.
        saver: writes checkpoints.
        evaluator: None without held-out data.
        patience: ends the run when evaluations get no better; None: nothing does.
        seed: of the run.
        start: number of steps that are done already.
        ignore_index: the label of tokens without loss.
        ledger: is told the samples of each step; None: nobody asks for them.
        nonfinite: judges steps that were not applied; None: they are skipped, up to 10 in a row.
        explaining: a context that explains a want of memory.
        profiling: a context around each step.
        meter: measures the steps; None: one that knows nothing of the model and the sources.
        owed: what of `start` is still to be done.
        garbage: collects Python's reference cycles; None: Python does as it likes.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        feed: StepFeed,
        ranks: Ranks,
        cadence: Cadence,
        log: MetricLog,
        saver: Saves,
        evaluator: Evaluates | None,
        patience: LosesPatience | None = None,
        seed: int,
        start: int,
        ignore_index: int = IGNORE_INDEX,
        ledger: Records | None = None,
        nonfinite: NonfiniteSteps | None = None,
        explaining: Explains = unexplained,
        profiling: Profiles = unprofiled,
        meter: Meter | None = None,
        owed: Owed = NOTHING_OWED,
        garbage: GarbageCollection | None = None,
    ) -> None:
        self.engine = engine
        self.feed = feed
        self.ranks = ranks
        self.cadence = cadence
        self.log = log
        self.saver = saver
        self.evaluator = evaluator
        self.patience = patience
        self.seed = seed
        self.ignore_index = ignore_index
        self.ledger = ledger
        self.explaining = explaining
        self.profiling = profiling
        self.meter = meter or Meter(ranks, cadence, log, engine.device, start=start)
        self.nonfinite = nonfinite or NonfiniteSteps("skip", 10, ranks, log.message)
        self.garbage = garbage or GarbageCollection(0)
        self.position = start
        self._has_targets = start > 0  # a resumed run has had some before
        self._owed = owed
        self._saved_at = start if start and not owed.save else -1
        self._evaluated_at = -1

    def run(self) -> Ending:
        """Train. Collective: every rank calls this.

        Raises:
            DataError: a rank's storage failed, or too many samples are damaged; a checkpoint was written first. Or no
                sample of the whole run could be used.
            CheckpointError: a checkpoint could not be written.
            DivergedError: the gradient is not finite, and the configuration says that this ends the run; a checkpoint
                was written first.
            ConfigError: memory ran out on this rank.
        """
        try:
            with self.garbage:
                return self._run()
        except AskedToStop as asked:  # by all ranks, in the midst of an evaluation
            self.log.message(f"{asked}: the evaluation at step {self.position} is given up; saving, then stopping")
            self._save_and_wait()
            return Ending.PREEMPTED

    def _run(self) -> Ending:
        self.ranks.progress.at("data wait", self.position)
        if self._owed.save:
            self._save()
        if self._owed.evaluation or (self.cadence.eval_on_start and self.position == 0):
            self._evaluate()
        self.meter.start_clock()
        for fetched in self.feed if self._goes_on else ():
            if fetched.verdict.ranks_with("save_error"):
                self.saver.settle()
            if fetched.verdict.ranks_with("fetch_error"):
                self._save_and_wait()
                raise self._fetch_failure(fetched)
            if fetched.overdrawn is not None:
                self._save_and_wait()
                raise DataError(fetched.overdrawn.message(self._examples(fetched)))
            if fetched.verdict.ranks_with("stop"):
                self.log.message(f"{describe_stop(fetched.verdict.per_rank['stop'])}: saving, then stopping")
                self._save_and_wait()
                return Ending.PREEMPTED
            try:
                with self.profiling(fetched.plan.step + 1):
                    self._train_step(fetched)
            except DivergedError:  # raised by all ranks alike; nothing of this step was applied
                self._save_and_wait()
                raise
            self.position = fetched.plan.step + 1
            self.ranks.progress.at("reporting", self.position)
            self.meter.report(self.position)
            self.garbage.step_done(self.position)
            if self.cadence.due(self.position, self.cadence.save_steps):
                self._save()  # first: an evaluation can outlast the grace period of a job that is asked to stop
            if self.cadence.due(self.position, self.cadence.eval_steps):
                self._evaluate()
            if not self._goes_on:
                break
            self.ranks.progress.at("data wait")
        if self._has_lost_patience:
            self.log.message(f"{self.patience}: the run ends at step {self.position} of {self.cadence.num_steps}")
        self._save_and_wait()
        if not self._has_targets and self.position:
            raise DataError(
                f"nothing was learned: no sample of the {self.position} steps could be used, or none has an answer; "
                "quarantine/rank-*.jsonl in output_dir says why, sample by sample"
            )
        is_complete = self.position >= self.cadence.num_steps or self._has_lost_patience
        return Ending.COMPLETE if is_complete else Ending.STOPPED_AT

    @property
    def _has_lost_patience(self) -> bool:
        return self.patience is not None and self.patience.is_over

    @property
    def _goes_on(self) -> bool:
        return self.position < self.cadence.last_step and not self._has_lost_patience

    def _train_step(self, fetched: FeedStep) -> None:
        """One optimizer update; none where no rank has a target token, so that there is nothing to learn."""
        num_targets = fetched.verdict.total["num_target_tokens"]
        tally = StepTally(self.meter)
        outcome: StepOutcome | None = None
        is_lost = False
        if num_targets:
            self._has_targets = True
            for micro_batch, following in fetched.in_order():
                seed_micro_batch(self.seed, micro_batch.job.step, micro_batch.job.micro_batch)
                with self.explaining(f"step {fetched.plan.step + 1}", micro_batch):
                    self.ranks.progress.at("forward", samples=micro_batch.origins)
                    with tally.forward(micro_batch) as groups:
                        micro_loss = self.engine.loss(micro_batch.inputs, micro_batch.labels, self.ignore_index, groups)
                    if (ahead := following()) is not None:
                        self.engine.copy_ahead(ahead.inputs)
                    self.ranks.progress.at("backward", samples=micro_batch.origins)
                    self.engine.backward(micro_loss, num_targets)
                tally.losses.append(micro_loss.detach())
            self.ranks.progress.at("step", samples=[one for batch in fetched.micro_batches for one in batch.origins])
            with self.explaining(f"step {fetched.plan.step + 1}, optimizer step"):
                outcome = self.engine.step()
            is_lost = self.nonfinite.judge(fetched.plan.step + 1, outcome, tally.losses, fetched.micro_batches)
        if self.ledger is not None:
            is_applied = outcome is not None and outcome.applied
            self.ledger.record(fetched.plan, fetched.micro_batches, is_applied=is_applied)
        self.meter.add(tally, fetched, outcome, is_finite=not is_lost)

    def _evaluate(self) -> None:
        if self.evaluator is None or self._evaluated_at == self.position:
            return
        self._evaluated_at = self.position
        self.ranks.progress.at("evaluation")
        explaining = self.explaining(f"evaluation at step {self.position}")
        with self.meter.pause("evaluation"), self.garbage.left_to_python(), explaining:
            figures = dict(self.evaluator.run(self.position))
        self.log.log_eval(self.position, figures)
        self.saver.evaluated(self.position, figures)
        if self.patience is not None:
            self.patience.hear(self.position, figures)

    def _save(self) -> None:
        if self._saved_at == self.position or self.position == 0:
            return
        self._saved_at = self.position
        self.ranks.progress.at("saving")
        with self.meter.pause("save"):
            self.saver.begin(self.position)

    def _save_and_wait(self) -> None:
        """Have this position on the disk, before anything ends. Collective: every rank calls this."""
        self._save()
        self.meter.report_window(self.position)  # a run that goes on from here begins a window of its own
        self.saver.finish()

    def _examples(self, fetched: FeedStep) -> list[str]:
        """A few unusable samples of any rank, the same on all. Collective: every rank calls this."""
        return [line for lines in self.ranks.gather_objects(fetched.bad_samples) for line in lines][:_NUM_EXAMPLES]

    def _fetch_failure(self, fetched: FeedStep) -> DataError:
        """Every rank learns what went wrong where, so that whichever log is read has it."""
        messages: list[Any] = self.ranks.gather_objects(str(fetched.error) if fetched.error else None)
        rank, message = next((r, m) for r, m in enumerate(messages) if m)
        return DataError(f"step {fetched.plan.step}, rank {rank}: {message}")
