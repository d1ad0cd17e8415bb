"""Locks between processes and threads of a node: one byte of one file each, freed by the kernel when its owner dies."""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FLOCK = "hhqqi4x"  # l_type, l_whence, l_start, l_len, l_pid of struct flock with 64-bit offsets


@contextmanager
def byte_lock(path: Path, name: str, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a name for the block.

    The lock belongs to an open file, not to a process, so it also keeps threads of one process apart, and there is
    nothing to clean up after a crash.

    Args:
        path: of the file; made if missing. Its directory must be on a disk of this machine.
        name: what is locked.
        wait: until it is free; otherwise the block runs with False where it is not.
    """
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        request = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, 1, 0)
        is_held = True
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, request)
        except (BlockingIOError, PermissionError):
            is_held = False
        yield is_held
    finally:
        os.close(descriptor)
