"""Positioned reads from many files, opened when they are needed and closed when they are too many."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vlm_dist.data.storage.recent import Recent
from vlm_dist.errors import DataError

_MAX_OPEN_FILES = 128
_READ_ATTEMPTS = 3
_BACKOFF_SECONDS = 0.2
_T = TypeVar("_T")


class OpenFiles:
    """Reads byte ranges of files by number.

    Keeps no position, so it works after a fork and after pickling, with any number of readers.

    Args:
        paths: the files; a file's number is its place in them.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.paths = [str(path) for path in paths]
        self._open: Recent[int, Descriptor] = Recent(_MAX_OPEN_FILES)

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Read exactly `size` bytes.

        Raises:
            DataError: if the file is missing or shorter, or the storage fails.
        """
        try:
            descriptor = self._open.get(number, self._open_file)  # held here, or another thread might close it
            data = os.pread(descriptor.number, size, offset)
        except OSError:
            data = self._read_again(number, offset, size)
        if len(data) < size:  # the end of the file; or more than Linux reads at once
            data = self._read_again(number, offset, size)
            if len(data) < size:
                raise truncated(self.paths[number], offset, size, len(data))
        return data

    def will_read(self, number: int, spans: Iterable[Sequence[int]]) -> None:
        """Have the operating system read ahead: (start, stop) in bytes. Costs a few microseconds a span.

        Raises:
            OSError: if the file cannot be opened.
        """
        descriptor = self._open.get(number, self._open_file)
        for start, stop in spans:
            descriptor.will_read(start, stop)

    def _read_again(self, number: int, offset: int, size: int) -> bytes:
        path = self.paths[number]
        try:
            return with_retries(path, lambda: self._open.get(number, self._open_file).read(offset, size))
        except FileNotFoundError as error:
            raise DataError(f"{path}: the file is missing") from error

    def _open_file(self, number: int) -> Descriptor:
        return Descriptor(self.paths[number])

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.paths = state["paths"]
        self._open = Recent(_MAX_OPEN_FILES)


class Descriptor:
    """An open file; closed when nobody uses it any more: it may leave a cache while another thread still reads."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, size: int) -> bytes:
        """Read up to `size` bytes; fewer only at the end of the file."""
        data = os.pread(self.number, size, offset)
        while len(data) < size:  # Linux reads at most 2 GiB at once
            more = os.pread(self.number, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def will_read(self, start: int, stop: int) -> None:
        """Have the operating system read ahead."""
        os.posix_fadvise(self.number, start, stop - start, os.POSIX_FADV_WILLNEED)

    def is_deleted(self) -> bool:
        """Whether the file has no name any more; its space is free only when it is closed."""
        return os.fstat(self.number).st_nlink == 0

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # a default, because at the end of the interpreter modules may be gone before this object is
        if self.number >= 0:
            close(self.number)


def truncated(place: str, offset: int, size: int, got: int) -> DataError:
    """The error of a file that ends too early."""
    return DataError(f"{place}: truncated: {size} bytes expected at {offset}, got {got}; copy the file again")


def with_retries(what: str, action: Callable[[], _T]) -> _T:
    """Run a read; a storage that fails is asked again before the run is given up.

    Raises:
        DataError: if all attempts failed.
        FileNotFoundError, IsADirectoryError, NotADirectoryError: at once; asking again would not help.
    """
    for attempt in range(_READ_ATTEMPTS):
        try:
            return action()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise
        except OSError as error:
            if attempt == _READ_ATTEMPTS - 1:
                raise DataError(f"{what}: cannot be read: {error}") from error
            time.sleep(_BACKOFF_SECONDS * 2**attempt)
    raise AssertionError("unreachable")
