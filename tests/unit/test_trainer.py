"""The loop with stand-ins for its parts: what happens when, and what happens when something goes wrong."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from vlm_dist.data.error_budget import ErrorBudget
from vlm_dist.data.feed import FeedStep
from vlm_dist.data.types import MicroBatch, MicroBatchJob, StepPlan
from vlm_dist.distributed.agreement import StepAgreement
from vlm_dist.distributed.progress import Progress
from vlm_dist.engine import StepOutcome
from vlm_dist.errors import CheckpointError, DataError
from vlm_dist.loss import token_loss_sum
from vlm_dist.trainer import Trainer, seed_micro_batch
from vlm_dist.trainer_parts import Cadence, Ending, Owed

FIELDS = (
    *("stop", "fetch_error", "save_error"),
    *("num_target_tokens", "num_samples", "num_tokens", "num_computed_tokens", "null_decode"),
)


NOTHING = Owed()


class Engine:
    """Counts calls; its loss depends on one parameter, so that backward works."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.num_targets: list[int] = []
        self.noise: list[float] = []
        self.ahead: list[tuple[int, int]] = []  # calls before, and of which inputs

    def loss(
        self, inputs: dict[str, torch.Tensor], labels: torch.Tensor, ignore_index: int, groups: Any = None
    ) -> torch.Tensor:
        self.calls.append("loss")
        self.noise.append(float(torch.rand(())))
        return token_loss_sum(torch.zeros(1, 4, 8, requires_grad=True), labels, ignore_index)

    def copy_ahead(self, inputs: dict[str, torch.Tensor]) -> None:
        self.ahead.append((len(self.calls), id(inputs)))

    def backward(self, loss_sum: torch.Tensor, num_target_tokens: int) -> None:
        self.calls.append("backward")
        self.num_targets.append(num_target_tokens)
        loss_sum.backward()

    def step(self) -> StepOutcome:
        self.calls.append("step")
        return StepOutcome(applied=True, learning_rate=0.1, raw_grad_norm=1.0)


@dataclass
class Log:
    steps: list[int] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    evals: list[int] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def advance(self, step: int, eta_seconds: float | None) -> None: ...

    def log_step(self, metrics: Any) -> None:
        self.steps.append(metrics.step)
        self.losses.append(metrics.loss)

    def log_eval(self, step: int, metrics: dict[str, float]) -> None:
        self.evals.append(step)

    def message(self, text: str) -> None:
        self.messages.append(text)


@dataclass
class Saver:
    """Fails, where it does, when the ranks agree."""

    saved: list[int]
    judged: list[int] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    error: str | None = None

    def begin(self, position: int) -> None:
        self.saved.append(position)

    def evaluated(self, position: int, figures: Any) -> None:
        self.judged.append(position)

    def finish(self) -> None:
        self.finished.append(self.saved[-1] if self.saved else 0)
        self.settle()

    def settle(self) -> None:
        if self.error:
            raise CheckpointError(self.error)


def feed(start: int, stop: int, *, events: dict[int, dict[str, int]] | None = None, num_micro_batches: int = 2) -> Any:
    """Steps of two micro-batches with three targets each, but for what `events` says of a step."""
    for step in range(start, stop):
        batches = [
            MicroBatch(
                job=MicroBatchJob(step, index, ()),
                inputs={},
                labels=torch.tensor([[-100, 1, 2, 3]]),
                num_samples=1,
                num_target_tokens=3,
                num_tokens=4,
                num_computed_tokens=4,
            )
            for index in range(num_micro_batches)
        ]
        counts = {"num_target_tokens": 3 * num_micro_batches, "num_samples": num_micro_batches}
        counts |= (events or {}).get(step, {})
        verdict = StepAgreement(FIELDS).vote(step, counts).wait()
        error = DataError("disk gone") if counts.get("fetch_error") else None
        plan = StepPlan(step, (step + 1) / 10, ())
        yield FeedStep(
            plan=plan,
            micro_batches=batches,
            verdict=verdict,
            data_wait_seconds=0.0,
            fetch_seconds=0.0,
            error=error,
            overdrawn=ErrorBudget(0.0).add({"num_samples": 7, "null_decode": counts.get("null_decode", 0)}),
            bad_samples=("vqa/0.tar:7 (decode): cut",),
        )


@pytest.fixture
def ranks(tmp_path: Any) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield SimpleNamespace(
        rank=0,
        world_size=1,
        control=dist.new_group(backend="gloo"),
        gather_objects=lambda value: [value],
        progress=Progress(),
    )
    dist.destroy_process_group()


def make(
    ranks: Any, steps: Any, start: int = 0, owed: Owed = NOTHING, **cadence: Any
) -> tuple[Trainer, Engine, Log, list[int]]:
    engine, log, saved = Engine(), Log(), []
    settings = {"num_steps": 10, "logging_steps": 0, "eval_steps": 0, "save_steps": 0} | cadence

    evaluator = SimpleNamespace(run=lambda position: {"loss": 1.0})
    trainer = Trainer(
        engine=engine,  # type: ignore[arg-type]
        feed=steps,
        ranks=ranks,
        cadence=Cadence(**settings),
        log=log,  # type: ignore[arg-type]
        saver=Saver(saved),
        evaluator=evaluator,
        seed=42,
        start=start,
        owed=owed,
    )
    return trainer, engine, log, saved


def test_everything_happens_when_it_is_due_and_at_the_end(ranks: Any) -> None:
    trainer, engine, log, saved = make(
        ranks, feed(0, 10), logging_steps=4, eval_steps=3, save_steps=5, eval_on_start=True
    )
    assert trainer.run() is Ending.COMPLETE
    assert log.steps == [4, 8, 10]
    assert log.losses == pytest.approx([torch.log(torch.tensor(8.0)).item()] * 3)
    assert log.evals == [0, 3, 6, 9, 10]
    assert saved == [5, 10]
    assert engine.calls == ["loss", "backward", "loss", "backward", "step"] * 10
    assert set(engine.num_targets) == {6}  # of the whole step, not of the micro-batch


def test_a_step_without_targets_is_skipped_by_all(ranks: Any) -> None:
    trainer, engine, log, _ = make(
        ranks, feed(0, 3, events={1: {"num_target_tokens": 0}}), num_steps=3, logging_steps=1
    )
    assert trainer.run() is Ending.COMPLETE
    assert engine.calls.count("step") == 2
    assert log.steps == [1, 2, 3]
    assert log.losses[1] is None


def test_a_stop_request_saves_before_the_step_it_was_voted_with(ranks: Any) -> None:
    trainer, engine, _, saved = make(ranks, feed(0, 10, events={4: {"stop": 1}}))
    assert trainer.run() is Ending.PREEMPTED
    assert (saved, trainer.position, engine.calls.count("step")) == ([4], 4, 4)


def test_a_run_that_is_stopped_logs_the_steps_since_the_last_line(ranks: Any) -> None:
    """The one that goes on has a window of its own: they would be in no line."""
    trainer, _, log, saved = make(ranks, feed(0, 10, events={4: {"stop": 1}}), logging_steps=3)
    assert trainer.run() is Ending.PREEMPTED
    assert (saved, log.steps) == ([4], [3, 4])
    trainer, _, log, _ = make(ranks, feed(0, 10, events={4: {"stop": 1}}), logging_steps=0)
    assert trainer.run() is Ending.PREEMPTED
    assert log.steps == []


def test_stop_at_step_ends_there_and_keeps_the_schedule(ranks: Any) -> None:
    trainer, engine, log, saved = make(ranks, feed(0, 10), stop_at_step=5, logging_steps=4)
    assert trainer.run() is Ending.STOPPED_AT
    assert (saved, engine.calls.count("step"), log.steps) == ([5], 5, [4, 5])


class Impatient:
    """Loses its patience with the second evaluation."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    def hear(self, position: int, figures: Any) -> None:
        self.heard.append(position)

    @property
    def is_over(self) -> bool:
        return len(self.heard) > 1

    def __str__(self) -> str:
        return "enough"


def test_a_run_that_gets_no_better_is_complete(ranks: Any) -> None:
    trainer, engine, log, saved = make(ranks, feed(0, 10), eval_steps=3, save_steps=4)
    trainer.patience = Impatient()
    assert trainer.run() is Ending.COMPLETE
    assert (trainer.patience.heard, saved, engine.calls.count("step")) == ([3, 6], [4, 6], 6)
    assert "enough: the run ends at step 6 of 10" in log.messages
    # resumed from there, it has heard the same
    again, engine, _, saved = make(ranks, feed(6, 10), start=6)
    again.patience = trainer.patience
    assert again.run() is Ending.COMPLETE
    assert (saved, engine.calls, again.position) == ([], [], 6)


@pytest.mark.parametrize("start", [5, 8])
def test_a_run_that_is_at_its_stop_already_does_nothing(ranks: Any, start: int) -> None:
    trainer, engine, _, saved = make(ranks, feed(start, 10), start=start, stop_at_step=5)
    assert trainer.run() is Ending.STOPPED_AT
    assert (saved, engine.calls, trainer.position) == ([], [], start)


def test_a_failed_fetch_saves_and_tells_which_rank_and_step(ranks: Any) -> None:
    trainer, engine, _, saved = make(ranks, feed(0, 10, events={3: {"fetch_error": 1}}))
    with pytest.raises(DataError, match="step 3, rank 0: disk gone"):
        trainer.run()
    assert (saved, engine.calls.count("step")) == ([3], 3)


def test_an_overdrawn_error_budget_saves_and_says_what_to_do(ranks: Any) -> None:
    trainer, engine, _, saved = make(ranks, feed(0, 10, events={3: {"null_decode": 2}}))
    with pytest.raises(DataError) as caught:
        trainer.run()
    message = str(caught.value)
    assert "2 of the last 9 samples of all ranks cannot be used (2 decode)" in message
    for told in ("vqa/0.tar:7 (decode): cut", "quarantine/rank-*.jsonl", "verify --decode", "raise data.max_bad_share"):
        assert told in message
    assert (saved, engine.calls.count("step")) == ([3], 3)


def test_a_failure_before_the_first_step_saves_nothing(ranks: Any) -> None:
    trainer, _, _, saved = make(ranks, feed(0, 10, events={0: {"stop": 1}}))
    assert trainer.run() is Ending.PREEMPTED
    assert saved == []


def test_a_resumed_run_does_not_save_its_start_again(ranks: Any) -> None:
    trainer, engine, _, saved = make(ranks, feed(6, 10), start=6, save_steps=2)
    assert trainer.run() is Ending.COMPLETE
    assert (saved, engine.calls.count("step")) == ([8, 10], 4)


@pytest.mark.parametrize("start", [6, 10])
def test_what_the_run_before_has_left_undone_comes_first(ranks: Any, start: int) -> None:
    trainer, _, log, saved = make(ranks, feed(start, 10), start=start, owed=Owed(True, True), eval_steps=3)
    assert trainer.run() is Ending.COMPLETE
    assert (saved, log.evals) == (([6, 10], [6, 9, 10]) if start == 6 else ([10], [10]))
    assert trainer.saver.judged == log.evals  # type: ignore[attr-defined]


def test_dropout_depends_on_the_micro_batch_and_not_on_who_runs_it(ranks: Any) -> None:
    whole, resumed = make(ranks, feed(0, 4), num_steps=4), make(ranks, feed(2, 4), start=2, num_steps=4)
    for trainer, *_ in (whole, resumed):
        torch.rand(7)
        trainer.run()
    assert len(set(whole[1].noise)) == 8
    assert whole[1].noise[4:] == resumed[1].noise
    seed_micro_batch(42, 3, 1)
    assert float(torch.rand(())) == whole[1].noise[-1]


def test_a_seed_is_torchs_own_on_the_devices_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    for is_initialized in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda it=is_initialized: it)
        seed_micro_batch(42, 3, 1)
    mixed = torch.initial_seed()
    ours = torch.rand(3)
    assert seeds == [mixed]
    monkeypatch.undo()
    torch.manual_seed(mixed)
    assert torch.equal(torch.rand(3), ours)


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_the_next_step(ranks: Any) -> None:
    trainer, engine, _, saved = make(ranks, feed(0, 10, events={5: {"save_error": 1}}), save_steps=4)
    trainer.saver.error = "checkpoint-4 could not be written"  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="checkpoint-4 could not be written"):
        trainer.run()
    assert (saved, engine.calls.count("step")) == ([4], 5)


@pytest.mark.parametrize("event", ["stop", "fetch_error", None])
def test_whatever_ends_the_run_waits_for_what_is_being_written(ranks: Any, event: str | None) -> None:
    trainer, *_ = make(ranks, feed(0, 10, events={7: {event: 1}} if event else None), save_steps=4)
    with contextlib.suppress(DataError):
        trainer.run()
    assert trainer.saver.finished == [7 if event else 10]  # type: ignore[attr-defined]


def test_what_comes_next_is_copied_while_the_forward_runs(ranks: Any) -> None:
    steps = list(feed(0, 2))
    first, second = steps
    steps[0] = replace(first, next_ready=lambda: second.micro_batches[0])
    trainer, engine, _, _ = make(ranks, steps, num_steps=2)
    trainer.run()
    assert engine.calls == ["loss", "backward", "loss", "backward", "step"] * 2
    inputs = [id(batch.inputs) for step in (first, second) for batch in step.micro_batches]
    # behind each forward and before its backward; nothing is ready behind the last
    assert engine.ahead == [(1, inputs[1]), (3, inputs[2]), (6, inputs[3])]
