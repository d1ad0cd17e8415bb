import time
from types import SimpleNamespace

import pytest
import torch

from vlm_dist.engine.device_time import DeviceTimer, leave_out_gathering

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_waiting_for_weights_is_left_out_of_a_forward(device: str) -> None:
    coordinator = SimpleNamespace(fetch_sub_module=lambda module, forward: time.sleep(0.3))
    zero = SimpleNamespace(parameter_offload=SimpleNamespace(get_param_coordinator=lambda: coordinator))
    timer = DeviceTimer(torch.device(device))
    leave_out_gathering(zero, timer)
    with timer.measure():
        coordinator.fetch_sub_module(None, forward=True)
        time.sleep(0.1)
    coordinator.fetch_sub_module(None, forward=False)  # in the backward: nothing is measured there
    if device == "cpu":
        assert 0.09 < timer.take() < 0.3
    assert timer.take() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_device_is_measured_and_not_the_host() -> None:
    timer = DeviceTimer(torch.device("cuda"))
    for _ in range(200):
        with timer.measure():
            torch.cuda._sleep(1_000_000)
    assert timer.take() > 0.05
