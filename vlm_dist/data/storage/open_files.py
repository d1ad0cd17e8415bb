"""Positioned reads from many files, opened when they are needed and closed when they are too many."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

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

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Read exactly `size` bytes.

        Raises:
            DataError: if the file is missing or shorter, or the storage fails.
        """
        path = self.paths[number]
        try:
            data = with_retries(str(path), lambda: self._descriptor(number).read(offset, size))
        except FileNotFoundError as error:
            raise DataError(f"{path}: the file is missing") from error
        if len(data) < size:
            raise DataError(
                f"{path}: truncated: {size} bytes expected at {offset}, got {len(data)}; copy the file again"
            )
        return data

    def _descriptor(self, number: int) -> _Descriptor:
        descriptor = self._open.get(number)
        if descriptor is None:
            descriptor = self._open[number] = _Descriptor(self.paths[number])
            while len(self._open) > _MAX_OPEN_FILES:
                self._open.popitem(last=False)
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.paths = state["paths"]
        self._open = OrderedDict()


class _Descriptor:
    """Closed when nobody uses it any more: it may leave the cache while another thread still reads."""

    def __init__(self, path: Path) -> None:
        self._number = -1
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._number, size, offset)
        while len(data) < size:  # Linux reads at most 2 GiB at once
            more = os.pread(self._number, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # a default, because at the end of the interpreter modules may be gone before this object is
        if self._number >= 0:
            close(self._number)


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
