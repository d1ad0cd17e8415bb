"""What the loop measures, and what it must not do for it: wait for the device, or for other ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from tests.unit.test_trainer import Engine, feed, make, ranks  # noqa: F401 - a fixture
from vlm_dist.data.types import MicroBatch, MicroBatchJob, SampleRef
from vlm_dist.engine import StepOutcome
from vlm_dist.loss import TokenGroups
from vlm_dist.meter import Meter, StepTally
from vlm_dist.model.flops import Flops
from vlm_dist.trainer_parts import Cadence

#: What makes the host wait for a device.
WAITS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "nonzero")


class OnDevice(torch.Tensor):
    """A tensor whose value is asked for at a price; so is that of all that is computed from it."""

    waits: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in WAITS:
            cls.waits.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


class DeviceEngine(Engine):
    """Its losses and norms lie on a device."""

    def loss(self, *args: Any) -> torch.Tensor:
        groups: TokenGroups | None = args[3]
        if groups is not None:
            groups.add(torch.full((len(groups.index),), 2.0), 0)
        self.calls.append("loss")
        return torch.tensor(6.0, requires_grad=True).as_subclass(OnDevice)

    def backward(self, loss_sum: torch.Tensor, num_target_tokens: int) -> None:
        self.calls.append("backward")

    def step(self) -> StepOutcome:
        self.calls.append("step")
        return StepOutcome(applied=True, learning_rate=0.1, raw_grad_norm=torch.tensor(1.0).as_subclass(OnDevice))


@pytest.fixture
def waits() -> list[str]:
    OnDevice.waits.clear()
    return OnDevice.waits


def sourced(steps: Any) -> Any:
    """Two samples of different sources in each micro-batch."""
    for step in steps:
        for batch in step.micro_batches:
            batch.refs = [SampleRef(0, 1), SampleRef(1, 7)]
            batch.sample_targets, batch.sample_tokens = [1, 2], [3, 1]
        yield step


def with_meter(ranks: Any, monkeypatch: pytest.MonkeyPatch, steps: Any, **cadence: Any) -> tuple[Any, Any]:  # noqa: F811
    trainer, _, log, _ = make(ranks, steps, **cadence)
    records: list[dict[str, Any]] = []
    log_step = log.log_step
    monkeypatch.setattr(log, "log_step", lambda metrics: (records.append(metrics.as_record()), log_step(metrics)))
    trainer.engine = DeviceEngine()  # type: ignore[assignment]
    flops = SimpleNamespace(count=lambda inputs, labels, share: Flops(2e9, 3e9))
    trainer.meter = Meter(
        ranks, trainer.cadence, log, torch.device("cpu"), sources=["a", "b"], flops=flops, peak_flops=1e12,
        tower_factors={"vision": 0.1, "language": 1.0},
    )  # type: ignore[arg-type]  # fmt: skip
    return trainer, records


def test_a_step_without_a_line_waits_for_nothing(
    ranks: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    waits: list[str],
) -> None:
    gathers: list[str] = []
    gather = dist.all_gather_into_tensor
    monkeypatch.setattr(dist, "all_gather_into_tensor", lambda *a, **k: (gathers.append("gather"), gather(*a, **k)))
    seen: dict[int, tuple[int, int]] = {}
    trainer, records = with_meter(ranks, monkeypatch, sourced(feed(0, 10)), logging_steps=5)
    report = trainer.meter.report

    def watched(position: int) -> None:
        report(position)
        seen[position] = (len(waits), len(gathers))

    monkeypatch.setattr(trainer.meter, "report", watched)
    trainer.run()
    for position in (1, 2, 3, 4):
        assert seen[position] == (0, 0)
    per_line = seen[5]
    assert per_line[0] <= 2 and per_line[1] == 1  # the loss and the norm, and one exchange
    assert [seen[position] for position in (6, 7, 8, 9)] == [per_line] * 4
    assert len(records) == 2


def test_a_line_has_the_figures_of_sources_towers_and_operations(
    ranks: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer, records = with_meter(ranks, monkeypatch, sourced(feed(0, 2)), num_steps=2, logging_steps=2)
    trainer.run()
    (record,) = records
    assert record["loss"] == pytest.approx(2.0)
    assert (record["a/loss"], record["b/loss"]) == (2.0, 2.0)
    assert record["a/target_share"] == pytest.approx(1 / 3) and record["a/token_share"] == pytest.approx(3 / 4)
    assert (record["learning_rate/vision"], record["learning_rate/language"]) == (pytest.approx(0.01), 0.1)
    seconds = record["step_seconds"] * 2
    assert record["tflops_per_device"] == pytest.approx(4 * 2e9 / seconds / 1e12)
    assert record["hfu"] == pytest.approx(record["mfu"] * 1.5)
    assert record["eta_seconds"] == 0


def test_operations_that_cannot_be_counted_are_said_once(ranks: Any, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    flops = SimpleNamespace(count=lambda inputs, labels, share: 1 / 0)
    meter = Meter(ranks, Cadence(10, 1, 0, 0), None, torch.device("cpu"), flops=flops)  # type: ignore[arg-type]
    batch = MicroBatch(MicroBatchJob(0, 0, ()), {}, torch.zeros(1, 4), 0, 0, 0, 0)
    for _ in range(3):
        assert meter.count(batch).model != meter.count(batch).model  # NaN
    assert len(caplog.records) == 1 and "MFU is left out" in caplog.text


def test_one_source_is_not_told_apart(ranks: Any) -> None:  # noqa: F811
    meter = Meter(ranks, Cadence(10, 1, 0, 0), None, torch.device("cpu"), sources=["only"])  # type: ignore[arg-type]
    batch = MicroBatch(MicroBatchJob(0, 0, ()), {}, torch.zeros(1, 4), 0, 0, 0, 0)
    with StepTally(meter).forward(batch) as groups:
        assert groups is None
