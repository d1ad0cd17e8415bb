"""Keeps freed memory in the process that makes micro-batches.

A micro-batch of pictures takes tens of megabytes in a few blocks. The C library gives such blocks back to the system as
soon as they are free, and the system clears every page when it hands them out again: more work than decoding and
preparing the pictures. Measured with 8 pictures of 448 x 448 pixels: 9.4 ms of CPU a picture, 4.2 ms with blocks kept,
for 70 MiB more of resident memory.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT_BYTES = 256 << 20  # larger blocks are still given back at once


def keep_freed_memory() -> bool:
    """Keep freed blocks for the next allocation; False where the C library has no such setting."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl has not
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
