"""Inputs on their way to the device: a micro-batch is copied while the one before it is computed.

Only from page-locked memory (`dataloader_pin_memory`) does a copy go on by itself; from other memory it is as long as
it would be later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class SecondQueue(Protocol):
    """What a device offers beside the queue that it computes in."""

    def within(self) -> AbstractContextManager[Any]:
        """Work that is queued within goes into this queue."""

    def join(self, tensors: Iterable[Tensor]) -> None:
        """Have the computing queue wait for what is in this one, and keep what was made here until it is used there."""


class CudaQueue:
    """A stream of its own.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def within(self) -> AbstractContextManager[Any]:
        """See `SecondQueue`."""
        context: AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return context

    def join(self, tensors: Iterable[Tensor]) -> None:
        """See `SecondQueue`."""
        computing = torch.cuda.current_stream(self._stream.device)
        computing.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(computing)  # else its memory is taken for free once nobody here holds it


class Transfer:
    """Copies the inputs of micro-batches; at most one micro-batch is ahead.

    Args:
        device: where they go.
        dtype: of floating-point inputs there.
        queue: for copies ahead; None: nothing is copied ahead.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, queue: SecondQueue | None = None) -> None:
        self._device = device
        self._dtype = dtype
        self._queue = queue
        self._ahead: tuple[Mapping[str, Any], dict[str, Any]] | None = None

    @classmethod
    def to(cls, device: torch.device, dtype: torch.dtype) -> Transfer:
        """With what the device offers."""
        return cls(device, dtype, CudaQueue(device) if device.type == "cuda" else None)

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Copy what will be asked for next.

        Args:
            inputs: of a micro-batch; the same object is given to `take`.
        """
        if self._queue is None or (self._ahead is not None and self._ahead[0] is inputs):
            return
        with self._queue.within():
            self._ahead = inputs, self._moved(inputs)

    def take(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs on the device, copied now or before.

        Args:
            inputs: of a micro-batch; what is no tensor stays what it is.
        """
        if self._queue is None or self._ahead is None or self._ahead[0] is not inputs:
            return self._moved(inputs)
        moved, self._ahead = self._ahead[1], None
        self._queue.join(value for value in moved.values() if isinstance(value, Tensor))
        return moved

    def forget(self) -> None:
        """What is ahead is not needed."""
        self._ahead = None

    def _moved(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._to_device(value) for name, value in inputs.items()}

    def _to_device(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        moved = value.to(device=self._device, non_blocking=True)
        # there, not on the way: another dtype would be made by the host first, in memory that is not page-locked
        return moved.to(dtype=self._dtype) if value.is_floating_point() else moved
