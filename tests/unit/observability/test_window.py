import subprocess
import sys

import pytest
import torch

from vlm_dist.observability import window as window_module
from vlm_dist.observability.window import MetricWindow


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(window_module, "time", clock)
    return clock


def totals(targets=0, tokens=0, computed=0, samples=0, **null_slots):
    return {
        "num_target_tokens": targets, "num_tokens": tokens, "num_computed_tokens": computed, "num_samples": samples,
        "stop": 0, **null_slots,
    }  # fmt: skip


def flush(window, sums=None, world_size=1):
    return window.flush(
        sums=window.rank_sums() if sums is None else sums, world_size=world_size, step=4, num_steps=8, epoch=0.5,
        learning_rate=1e-4, grad_norm=2.0,
    )  # fmt: skip


def test_a_step_with_more_targets_weighs_more():
    window = MetricWindow()
    window.add(loss_sum=torch.tensor(10.0), totals=totals(targets=10), data_wait_seconds=0)
    window.add(loss_sum=torch.tensor(60.0), totals=totals(targets=20), data_wait_seconds=0)
    assert flush(window).loss == pytest.approx(70 / 30)


def test_the_loss_is_that_of_all_ranks():
    ranks = [MetricWindow(), MetricWindow()]
    for window, loss_sum in zip(ranks, (30.0, 6.0), strict=True):
        window.add(loss_sum=torch.tensor(loss_sum), totals=totals(targets=12), data_wait_seconds=0)
    sums = [sum(values) for values in zip(*(window.rank_sums() for window in ranks), strict=True)]
    assert flush(ranks[0], sums, world_size=2).loss == pytest.approx(3.0)


def test_thousands_of_steps_lose_no_precision():
    window = MetricWindow()
    for _ in range(5000):
        window.add(loss_sum=torch.tensor(16_777_217 / 16), totals=totals(targets=1), data_wait_seconds=0)
    assert flush(window).loss == float(torch.tensor(16_777_217 / 16))


def test_without_targets_there_is_no_loss():
    window = MetricWindow()
    window.add(loss_sum=torch.zeros(()), totals=totals(null_decode=4), data_wait_seconds=0)
    metrics = flush(window)
    assert metrics.loss is None
    assert metrics.null_slots == {"decode": 4}


def test_rates_and_shares(clock):
    window = MetricWindow()
    for _ in range(2):
        clock.now += 4
        window.add(
            loss_sum=torch.tensor(1.0),
            totals=totals(targets=10, tokens=600, computed=800, samples=8, null_tail=1),
            data_wait_seconds=1,
        )
    # two ranks: 2 seconds of waiting here, 6 there, in 8 seconds
    metrics = flush(window, [2.0, 8.0], world_size=2)
    assert metrics.step_seconds == 4
    assert metrics.tokens_per_second == 150
    assert metrics.samples_per_second == 2
    assert metrics.padding_share == pytest.approx(0.25)
    assert metrics.data_wait_share == pytest.approx(0.5)
    assert metrics.null_slots == {"tail": 2}
    assert metrics.num_window_steps == 2
    assert metrics.host_memory_bytes > 10_000_000


def test_evaluation_and_checkpoints_are_not_in_the_time_of_a_step(clock):
    window = MetricWindow()
    for _ in range(2):
        clock.now += 4
        window.add(loss_sum=torch.tensor(1.0), totals=totals(targets=1), data_wait_seconds=0)
        clock.now += 100
        window.restart_clock()
    assert flush(window).step_seconds == 4


def test_the_device_is_waited_for_within_the_window(clock):
    window = MetricWindow()
    clock.now += 1
    window.add(loss_sum=torch.tensor(1.0), totals=totals(targets=1), data_wait_seconds=0)
    window._loss_sum = _AfterSeconds(clock, 9)
    assert flush(window).step_seconds == 10


class _AfterSeconds:
    """A value on a device that has 9 seconds of work queued."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def __float__(self):
        self.clock.now += self.seconds
        return 1.0


def test_a_window_begins_empty_after_the_last_one():
    window = MetricWindow()
    window.add(loss_sum=torch.tensor(10.0), totals=totals(targets=10, null_tail=3), data_wait_seconds=0)
    flush(window)
    window.add(loss_sum=torch.tensor(5.0), totals=totals(targets=10, null_tail=0), data_wait_seconds=0)
    metrics = flush(window)
    assert metrics.loss == pytest.approx(0.5)
    assert metrics.null_slots == {"tail": 0}
    assert metrics.num_window_steps == 1


def test_observability_needs_no_torch_to_be_imported():
    code = "import sys, vlm_dist.observability.log, vlm_dist.observability.window; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
