"""Memory of the CPU that is freed goes back to the system: glibc would keep it.

Under ZeRO-3 each module is whole for a moment while it is loaded. glibc keeps such buffers, once they are freed, in
heaps in whose midst lie shares that stay in use: each process would grow to the size of the whole base, though its
tensors are its share. With buffers mapped one by one it stays at its share and a module (docs/zero.md has figures).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_WHILE_LOADING = 128 << 10
#: Where glibc's own adjustment ends in a process that uses large buffers; setting a threshold turns it off for good.
_AFTERWARDS = 32 << 20


@contextmanager
def freed_memory_goes_back() -> Iterator[None]:
    """Around work that frees many large buffers. Without glibc it does nothing."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _WHILE_LOADING)
    libc.mallopt(_M_TRIM_THRESHOLD, _WHILE_LOADING)
    libc.malloc_trim(0)  # else what is free already is used first
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _AFTERWARDS)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _AFTERWARDS)
        libc.malloc_trim(0)
