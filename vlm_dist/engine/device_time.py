"""How long the device of this rank was busy with its own work, found without waiting for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: Pairs of events that may be under way before those that have happened are read.
_MAX_PENDING = 64


class DeviceTimer:
    """Adds up the time between marks in the device's queue; on a CPU, of the clock.

    Args:
        device: whose current stream is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._has_events = device.type == "cuda"
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, int]] = deque()
        self._seconds = 0.0
        self._is_measuring = False

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Count what is queued within."""
        self._is_measuring = True
        try:
            with self._between(1):
                yield
        finally:
            self._is_measuring = False

    @contextmanager
    def leave_out(self) -> Iterator[None]:
        """Within `measure`: do not count what is queued within; elsewhere nothing."""
        if not self._is_measuring:
            yield
            return
        with self._between(-1):
            yield

    def take(self) -> float:
        """Seconds since the last call; waits for what is under way."""
        if self._pending:
            self._pending[-1][1].synchronize()
        while self._pending:
            self._read_first()
        seconds, self._seconds = self._seconds, 0.0
        return max(0.0, seconds)

    @contextmanager
    def _between(self, sign: int) -> Iterator[None]:
        if not self._has_events:
            started = time.perf_counter()
            yield
            self._seconds += sign * (time.perf_counter() - started)
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._pending.append((start, end, sign))
        while len(self._pending) > _MAX_PENDING and self._pending[0][1].query():
            self._read_first()

    def _read_first(self) -> None:
        start, end, sign = self._pending.popleft()
        self._seconds += sign * start.elapsed_time(end) / 1000


def leave_out_gathering(zero_optimizer: Any, timer: DeviceTimer) -> None:
    """Under ZeRO-3: do not count what a forward waits for weights, which come when the slowest rank has sent its part.

    Args:
        zero_optimizer: DeepSpeed's, of stage 3.
        timer: that measures forward passes.
    """
    coordinator = zero_optimizer.parameter_offload.get_param_coordinator()
    fetch = coordinator.fetch_sub_module

    def fetch_apart(*args: Any, **kwargs: Any) -> Any:
        with timer.leave_out():
            return fetch(*args, **kwargs)

    coordinator.fetch_sub_module = fetch_apart
