"""How results come back from a worker: small ones through its pipe, tensors in memory that both processes see.

Memory is an anonymous file (`memfd`) whose descriptor goes through the pipe once; both ends keep it mapped. The worker
copies its arrays into a piece of memory, the owner's tensors lie there without a copy, and when the last of them has
gone the owner tells the worker, with its next job, that the piece is free again. For 38 MB (8 pictures of 448 x 448
pixels) that is 2.3 ms; fresh memory for every result, as torch's DataLoader takes it, is 22 ms, a pickle through the
pipe 100 ms. There is no name to be unlinked and no limit of /dev/shm; what a worker had lent lives as long as its
tensors, also when the worker has died.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import pickle
import sys
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection, reduction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

log = logging.getLogger(__name__)

#: Below this a message through the pipe is as fast.
_MIN_SHARED_BYTES = 64 << 10
_ALIGNMENT_BYTES = 64  # of every array, for vector instructions
_SPARE = 1.25  # room for a larger result than the one that a piece is made for
#: A piece that was not used for so many results is given back.
_MAX_IDLE_RESULTS = 64


@dataclass(frozen=True, slots=True)
class Parcel:
    """A result that has arrived.

    Attributes:
        head: pickled, with its arrays left out.
        parts: these, as writable buffers.
    """

    head: bytes
    parts: Sequence[memoryview | bytearray]

    def open(self) -> Any:
        """Unpickle it; written by our own worker."""
        return pickle.loads(self.head, buffers=self.parts)  # noqa: S301


@dataclass(slots=True)
class _Piece:
    """Memory that a worker lends."""

    number: int
    memory: mmap.mmap
    descriptor: int | None  # until it is sent
    is_lent: bool = False
    last_result: int = 0


class Sender:
    """The worker's end.

    Args:
        pipe: to the owner.
    """

    def __init__(self, pipe: connection.Connection) -> None:
        self._pipe = pipe
        self._pieces: dict[int, _Piece] = {}
        self._num_results = 0
        self._num_pieces = 0

    def release(self, numbers: Sequence[int]) -> None:
        """Be told which pieces of memory the owner needs no more."""
        for number in numbers:
            if number in self._pieces:
                self._pieces[number].is_lent = False

    def send(self, content: Any) -> None:
        """Send a result.

        Raises:
            OSError: the owner is gone.
        """
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(content, 5, buffer_callback=buffers.append)
        parts = [buffer.raw() for buffer in buffers]
        sizes = [part.nbytes for part in parts]
        self._num_results += 1
        dropped = self._drop_idle()
        piece = self._piece_for(sum(_padded(size) for size in sizes))
        if piece is None:
            self._pipe.send((head, sizes, None, False, dropped))
            for part in parts:
                self._pipe.send_bytes(part)
            return
        for start, part in zip(_starts(sizes), parts, strict=True):
            piece.memory[start : start + part.nbytes] = part
        piece.is_lent, piece.last_result = True, self._num_results
        descriptor, piece.descriptor = piece.descriptor, None
        self._pipe.send((head, sizes, piece.number, descriptor is not None, dropped))
        if descriptor is not None:
            try:
                reduction.send_handle(self._pipe, descriptor, None)  # type: ignore[arg-type]  # Windows needs the pid
            finally:
                os.close(descriptor)

    def _piece_for(self, num_bytes: int) -> _Piece | None:
        """Choose the smallest piece that is free and large enough, or make one; None: the pipe is to be used."""
        if num_bytes < _MIN_SHARED_BYTES or not sys.platform.startswith("linux"):
            return None
        free = [piece for piece in self._pieces.values() if not piece.is_lent and len(piece.memory) >= num_bytes]
        if free:
            return min(free, key=lambda piece: len(piece.memory))
        try:
            descriptor = os.memfd_create("micro-batch", os.MFD_CLOEXEC)
            try:
                size = -(-int(num_bytes * _SPARE) // mmap.PAGESIZE) * mmap.PAGESIZE
                os.posix_fallocate(descriptor, 0, size)  # an error now, not a signal at the first touch
                memory = mmap.mmap(descriptor, size)
            except OSError:
                os.close(descriptor)
                raise
        except OSError as error:
            log.warning("no shared memory for a micro-batch (%s); it goes through the pipe, which is slow", error)
            return None
        self._num_pieces += 1
        piece = self._pieces[self._num_pieces] = _Piece(self._num_pieces, memory, descriptor)
        return piece

    def _drop_idle(self) -> list[int]:
        """Give back what has not been used for long: the pieces' numbers."""
        idle = [
            piece.number
            for piece in self._pieces.values()
            if not piece.is_lent and self._num_results - piece.last_result > _MAX_IDLE_RESULTS
        ]
        for number in idle:
            self._pieces.pop(number).memory.close()
        return idle


class Receiver:
    """The owner's end of one worker.

    Args:
        pipe: to the worker.
    """

    def __init__(self, pipe: connection.Connection) -> None:
        self._pipe = pipe
        self._pieces: dict[int, NDArray[np.uint8]] = {}
        self._released: deque[int] = deque()  # of any thread: wherever the last tensor is let go

    def take_released(self) -> list[int]:
        """Say which pieces of memory have become free since it was last asked, for `Sender.release`."""
        return [self._released.popleft() for _ in range(len(self._released))]

    def receive(self) -> Parcel:
        """Take a result.

        Raises:
            EOFError, OSError: the worker died on the way.
        """
        head, sizes, number, is_new, dropped = self._pipe.recv()
        for old in dropped:
            self._pieces.pop(old, None)
        if number is None:
            return Parcel(head, [bytearray(self._pipe.recv_bytes()) for _ in sizes])
        if is_new:
            descriptor = reduction.recv_handle(self._pipe)
            try:
                # Python's mmap would keep a descriptor, and a long step has hundreds of micro-batches
                name, size = f"/proc/self/fd/{descriptor}", os.fstat(descriptor).st_size
                self._pieces[number] = torch.from_file(name, shared=True, size=size, dtype=torch.uint8).numpy()
            finally:
                os.close(descriptor)
        memory = self._pieces[number]
        # all views of the result hold on to this object, so its end is theirs
        lease = (ctypes.c_char * len(memory)).from_buffer(memory.data)
        weakref.finalize(lease, self._released.append, number).atexit = False
        whole = memoryview(lease).cast("B")
        return Parcel(head, [whole[start : start + size] for start, size in zip(_starts(sizes), sizes, strict=True)])


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _starts(sizes: Sequence[int]) -> list[int]:
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += _padded(size)
    return starts
