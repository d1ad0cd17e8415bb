import math
import subprocess
import sys

import pytest
import torch

from vlm_dist.observability import window as window_module
from vlm_dist.observability.memory import DeviceMemory
from vlm_dist.observability.window import LineFacts, MetricWindow, StepShare


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


def share(loss_sum=1.0, data_wait_seconds=0.0, **values):
    return StepShare(loss_sum=torch.as_tensor(loss_sum), data_wait_seconds=data_wait_seconds, **values)


def add(window, loss_sum, seconds=0.0, is_finite=True, **counts):
    window.add(share=share(loss_sum, seconds), totals=totals(**counts), is_finite=is_finite)


def flush(*windows, forward=()):
    """The line of the first of the ranks' windows."""
    forward = forward or [0.0] * len(windows)
    rows = [window.rank_row(seconds) for window, seconds in zip(windows, forward, strict=True)]
    return windows[0].flush(rows, LineFacts(step=4, num_steps=8, epoch=0.5, learning_rate=1e-4, grad_norm=2.0))


def test_a_step_with_more_targets_weighs_more():
    window = MetricWindow()
    add(window, 10.0, targets=10)
    add(window, 60.0, targets=20)
    assert flush(window).loss == pytest.approx(70 / 30)


def test_the_loss_is_that_of_all_ranks():
    ranks = [MetricWindow(), MetricWindow()]
    for window, loss_sum in zip(ranks, (30.0, 6.0), strict=True):
        add(window, loss_sum, targets=12)
    assert flush(*ranks).loss == pytest.approx(3.0)


def test_thousands_of_steps_lose_no_precision():
    window = MetricWindow()
    for _ in range(5000):
        add(window, 16_777_217 / 16, targets=1)
    assert flush(window).loss == float(torch.tensor(16_777_217 / 16))


def test_without_targets_there_is_no_loss():
    window = MetricWindow()
    add(window, 0.0, null_decode=4, null_tail=3)
    metrics = flush(window)
    assert metrics.loss is None
    assert metrics.null_slots == {"decode": 4, "tail": 3}
    assert metrics.num_skipped == 4


def test_rates_and_shares(clock):
    ranks = [MetricWindow(), MetricWindow()]
    for _ in range(2):
        clock.now += 4
        for window, waited in zip(ranks, (1, 3), strict=True):
            add(window, 1.0, waited, targets=10, tokens=600, computed=800, samples=8, null_tail=1)
    # two ranks: 2 seconds of waiting here, 6 there, in 8 seconds
    metrics = flush(*ranks)
    assert metrics.step_seconds == 4
    assert metrics.tokens_per_second == 150
    assert metrics.samples_per_second == 2
    assert metrics.padding_share == pytest.approx(0.25)
    assert metrics.data_wait_share == pytest.approx(0.5)
    assert metrics.null_slots == {"tail": 2}
    assert metrics.num_window_steps == 2
    assert metrics.host_memory_bytes > 10_000_000


def test_utilisation_is_of_all_devices(clock):
    ranks = [MetricWindow(peak_flops=50e12), MetricWindow(peak_flops=150e12)]
    clock.now += 2
    for window, flops in zip(ranks, (40e12, 80e12), strict=True):
        window.add(share=share(model_flops=flops, hardware_flops=2 * flops), totals=totals(targets=1))
    metrics = flush(*ranks)
    assert metrics.tflops_per_device == pytest.approx(30)  # 120e12 in 2 s on 2 devices
    assert metrics.hardware_tflops_per_device == pytest.approx(60)
    assert (metrics.mfu, metrics.hfu) == (pytest.approx(0.3), pytest.approx(0.6))
    assert metrics.as_record()["mfu"] == metrics.mfu


@pytest.mark.parametrize("peaks", [(None, None), (100e12, None)])
def test_where_a_peak_is_unknown_there_is_no_share_of_it(clock, peaks):
    ranks = [MetricWindow(peak_flops=peak) for peak in peaks]
    clock.now += 1
    for window in ranks:
        window.add(share=share(model_flops=1e12, hardware_flops=1e12), totals=totals(targets=1))
    metrics = flush(*ranks)
    assert metrics.tflops_per_device == pytest.approx(1)
    assert metrics.mfu is None and "mfu" not in metrics.as_record()


def test_operations_that_one_rank_cannot_count_are_left_out(clock):
    ranks = [MetricWindow(peak_flops=1e12), MetricWindow(peak_flops=1e12)]
    clock.now += 1
    ranks[0].add(share=share(model_flops=1e12, hardware_flops=1e12), totals=totals(targets=1))
    ranks[1].add(share=share(), totals=totals(targets=1))
    record = flush(*ranks).as_record()
    assert not {"mfu", "hfu", "tflops_per_device", "hardware_tflops_per_device"} & set(record)


def test_the_slowest_rank_is_named_by_its_own_time():
    """Rank 2 fetches slowly and rank 1 computes slowly; what the others wait for them is not theirs."""
    ranks = [MetricWindow() for _ in range(4)]
    for window, fetch, waited in zip(ranks, (0.1, 0.1, 0.5, 0.1), (3.0, 0.1, 0.5, 2.0), strict=True):
        window.add(share=share(1.0, waited, fetch_seconds=fetch), totals=totals(targets=1))
    metrics = flush(*ranks, forward=(0.9, 2.9, 0.9, 0.9))
    assert (metrics.slowest_rank, metrics.slowest_rank_ratio) == (1, pytest.approx(3.0))
    alone = MetricWindow()
    add(alone, 1.0, targets=1)
    assert "slowest_rank" not in flush(alone).as_record()


def test_memory_is_that_of_the_rank_that_has_most(monkeypatch):
    ranks = [MetricWindow(), MetricWindow()]
    readings = iter([(10, DeviceMemory(5, 8)), (7, DeviceMemory(6, 7))])

    def row(window):
        host, device = next(readings)
        monkeypatch.setattr(window_module, "host_memory_bytes", lambda: host)
        monkeypatch.setattr(window_module, "device_memory", lambda: device)
        return window.rank_row()

    rows = [row(window) for window in ranks]
    metrics = ranks[0].flush(rows, LineFacts(4, 8, 0.5, 1e-4, None))
    assert (metrics.host_memory_bytes, metrics.device_memory_bytes, metrics.device_reserved_bytes) == (10, 6, 8)


def test_sources_have_their_own_losses_and_shares():
    ranks = [MetricWindow(["images", "clips"]), MetricWindow(["images", "clips"])]
    for window, losses, targets, tokens in (
        (ranks[0], [3.0, 1.0], [3, 1], [30, 10]),
        (ranks[1], [5.0, 0.0], [5, 0], [60, 0]),
    ):
        sources = torch.tensor(losses)
        part = share(sum(losses), source_losses=sources, source_targets=targets, source_tokens=tokens)
        window.add(share=part, totals=totals(targets=9))
    metrics = flush(*ranks)
    images, clips = metrics.sources["images"], metrics.sources["clips"]
    assert (images.loss, images.target_share, images.token_share) == (1.0, pytest.approx(8 / 9), pytest.approx(0.9))
    assert (clips.loss, clips.target_share, clips.token_share) == (1.0, pytest.approx(1 / 9), pytest.approx(0.1))
    assert metrics.as_record()["clips/target_share"] == clips.target_share


def test_a_step_that_was_not_applied_is_in_no_loss():
    window = MetricWindow(["images", "clips"])
    for loss, is_finite in ((math.nan, False), (2.0, True)):
        part = share(
            loss, source_losses=torch.tensor([loss, 0.0]), source_targets=[4, 0], source_tokens=[8, 0]
        )  # fmt: skip
        window.add(share=part, totals=totals(targets=4), is_finite=is_finite)
    metrics = flush(window)
    assert (metrics.loss, metrics.sources["images"].loss, metrics.sources["clips"].loss) == (0.5, 0.5, None)
    assert (metrics.num_nonfinite_steps, metrics.num_target_tokens) == (1, 4)


def test_evaluation_and_checkpoints_are_not_in_the_time_of_a_step(clock):
    window = MetricWindow()
    for _ in range(2):
        clock.now += 4
        add(window, 1.0, targets=1)
        clock.now += 100
        window.restart_clock()
    assert flush(window).step_seconds == 4


def test_the_device_is_waited_for_within_the_window(clock):
    window = MetricWindow()
    clock.now += 1
    add(window, 1.0, targets=1)
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
    window = MetricWindow(["a", "b"])
    for loss in (10.0, 5.0):
        part = share(loss, source_losses=torch.tensor([loss, 0.0]), source_targets=[10, 0], source_tokens=[10, 0])
        window.add(share=part, totals=totals(targets=10, null_tail=int(loss) // 10))
        metrics = flush(window)
    assert metrics.loss == metrics.sources["a"].loss == pytest.approx(0.5)
    assert metrics.null_slots == {"tail": 0}
    assert metrics.num_window_steps == 1


def test_observability_needs_no_torch_to_be_imported():
    code = "import sys, vlm_dist.observability.log, vlm_dist.observability.window; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
