"""Copies of shards on this machine, within a limit, for any number of processes.

A directory with one file per copy; a file that is there under its name is whole. Nothing else is kept: what was used
last is told by the files' times, what is being written by the lock that its writer holds. So no crash can leave the
cache in a state that has to be repaired.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from vlm_dist.data.storage.open_files import Descriptor
from vlm_dist.data.storage.remote.byte_lock import byte_lock
from vlm_dist.errors import DataError

_PART = ".part"
_LOCKS = ".locks"
_ROOM = "room"  # the lock of who looks for room
#: Keys of this folder are copies that cannot be made again for certain: they count, but are never removed.
SPOOL = "spool"
_GROWTH_BYTES = 64 * 1024 * 1024  # so much room is taken at once for a copy whose size nobody knows
#: What another process has announced so recently is not taken from it for something that is needed later.
_RECENT_SECONDS = 30.0
_POLL_SECONDS = 0.1
_MIN_FREE_SHARE = 0.02  # of the disk: others use it too

log = logging.getLogger(__name__)


class NoRoomError(Exception):
    """There is no room for a copy that may go in its place."""


class ShardCache:
    """A directory of copies.

    Args:
        directory: on a disk of this machine; None: a folder of this user in the directory for temporary files.
        max_bytes: of all copies together.

    Raises:
        DataError: the directory cannot be written.
    """

    def __init__(self, directory: Path | None, max_bytes: int) -> None:
        self.directory = directory or Path(tempfile.gettempdir()) / f"vlm-dist-cache-{os.getuid()}"
        self.max_bytes = max_bytes
        self._locks = self.directory / _LOCKS
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if directory is None and self.directory.stat().st_uid != os.getuid():
                raise DataError(f"{self.directory} belongs to another user; set data.cache.dir to a directory of yours")
            (self.directory / SPOOL).mkdir(exist_ok=True)
            with byte_lock(self._locks, _ROOM):
                self._remove_leftovers()
        except OSError as error:
            raise DataError(
                f"{self.directory}: the cache cannot be written ({error.strerror}); set data.cache.dir to a directory "
                "on a disk of this machine"
            ) from error

    def path(self, key: str) -> Path:
        """Where a copy is, if it is."""
        return self.directory / key

    def has(self, key: str) -> bool:
        """Whether there is a whole copy."""
        return self.path(key).exists()

    def touch(self, keys: Iterable[str]) -> None:
        """Say that copies are or will be used: what was said last is kept longest."""
        moment = time.time_ns()
        for key in keys:
            try:
                os.utime(self.path(key), ns=(moment, moment))
            except OSError:  # not there, or gone this moment: who needs it fetches it
                continue
            moment += 1000

    def is_being_fetched(self, key: str) -> bool:
        """Whether a process is fetching a copy right now."""
        if not self.path(key + _PART).exists():
            return False
        with byte_lock(self._locks, key, wait=False) as is_free:
            return not is_free

    def fetch(
        self,
        key: str,
        num_bytes: int | None,
        download: Callable[[int, Callable[[int], None]], int],
        *,
        keep: Collection[str] | None = None,
        check: Callable[[Path], None] = lambda path: None,
    ) -> Descriptor:
        """Open a copy; whoever comes first downloads it, the others wait.

        Args:
            key: file name of the copy; `spool/NAME` for one that is never removed.
            num_bytes: its size; None where that is not known.
            download: writes it to a descriptor, tells its progress, and returns its size.
            keep: copies that must not go to make room, beside those that others have announced; None: it is needed
                now, and the longest unused ones go, whatever they are.
            check: raises a DataError if the copy is not what it should be.

        Returns:
            The copy, which can be read even if it is removed meanwhile.

        Raises:
            NoRoomError: there is no room for it.
            DataError: it cannot be downloaded, or `check` refuses it.
        """
        copy = self._open(key)
        if copy is not None:
            return copy
        with byte_lock(self._locks, key):
            copy = self._open(key)  # another process was first
            if copy is not None:
                return copy
            part = self.path(key + _PART)
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            is_whole = False
            try:
                self._reserve(descriptor, num_bytes or 0, keep, key)
                size = self._download(descriptor, download, num_bytes, keep, key)
                os.ftruncate(descriptor, size)
                os.fdatasync(descriptor)
                check(part)
                copy = Descriptor(str(part))
                part.replace(self.path(key))
                is_whole = True
            finally:
                os.close(descriptor)
                if not is_whole:
                    part.unlink(missing_ok=True)
        return copy

    def rename(self, key: str, new_key: str) -> None:
        """Give a copy another name; one that is gone already stays gone."""
        with contextlib.suppress(FileNotFoundError):
            self.path(key).replace(self.path(new_key))

    def num_bytes(self) -> int:
        """Size of all copies, with those that are being written."""
        return sum(size for size, _, _ in self._entries())

    def _download(
        self,
        descriptor: int,
        download: Callable[[int, Callable[[int], None]], int],
        num_bytes: int | None,
        keep: Collection[str] | None,
        key: str,
    ) -> int:
        reserved = num_bytes or 0

        def make_room_for(written: int) -> None:
            nonlocal reserved
            if written > reserved:  # of an object whose size nobody told
                reserved = max(written, reserved + min(_GROWTH_BYTES, self.max_bytes // 16))
                self._reserve(descriptor, reserved, keep, key)

        while True:
            try:
                return download(descriptor, make_room_for)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise DataError(f"{self.directory}: the cache cannot be written: {error.strerror}") from error
                if not self._evict_one(keep, key):
                    raise self._no_room("the disk is full") from error

    def _reserve(self, descriptor: int, size: int, keep: Collection[str] | None, key: str) -> None:
        """Take disk space for a copy, so that no other process takes the same."""
        if size > self.max_bytes:
            raise self._no_room(f"the limit is {_shown(self.max_bytes)}, and this shard alone has {_shown(size)}")
        own = os.fstat(descriptor).st_size
        while True:
            with byte_lock(self._locks, _ROOM):
                if self._take(descriptor, own, size, keep, key):
                    return
                is_over = self.num_bytes() - own + size > self.max_bytes
                is_hopeless = keep is not None or own > 0 or not self._is_any_under_way(key)
            if is_hopeless:
                raise self._no_room(f"the limit is {_shown(self.max_bytes)}" if is_over else "the disk is full")
            time.sleep(_POLL_SECONDS)  # others take all of it for what they fetch; when they are done, that can go

    def _take(self, descriptor: int, own: int, size: int, keep: Collection[str] | None, key: str) -> bool:
        """Make room and take it; False where that cannot be."""
        while True:
            if self.num_bytes() - own + size <= self.max_bytes and self._has_disk(size - own):
                try:
                    if size > own:
                        os.posix_fallocate(descriptor, own, size - own)
                    return True
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise DataError(f"{self.directory}: the cache cannot be written: {error}") from error
            if not self._evict_one(keep, key):
                return False

    def _is_any_under_way(self, key: str) -> bool:
        """Whether another process or thread is writing a copy."""
        parts = [name for size, _, name in self._entries() if name.endswith(_PART) and size > 0]
        return any(self.is_being_fetched(name.removesuffix(_PART)) for name in parts if name != key + _PART)

    def _evict_one(self, keep: Collection[str] | None, key: str) -> bool:
        """Remove the copy that was not used for the longest time; False where none may go."""
        recent = time.time_ns() - int(_RECENT_SECONDS * 1e9)
        for size, used, name in sorted(self._entries(), key=lambda entry: entry[1]):
            if name.endswith(_PART) or name == key or name.startswith(f"{SPOOL}/"):
                continue
            if keep is not None and (name in keep or used > recent):
                continue
            log.debug("%s: removing %s (%d bytes)", self.directory, name, size)
            self.path(name).unlink(missing_ok=True)
            return True
        return False

    def _open(self, key: str) -> Descriptor | None:
        try:
            return Descriptor(str(self.path(key)))
        except FileNotFoundError:
            return None

    def _has_disk(self, size: int) -> bool:
        status = os.statvfs(self.directory)
        return status.f_bavail * status.f_frsize - size >= _MIN_FREE_SHARE * status.f_blocks * status.f_frsize

    def _no_room(self, why: str) -> NoRoomError:
        status = os.statvfs(self.directory)
        return NoRoomError(
            f"{self.directory}: no room in the cache: {why} ({_shown(self.num_bytes())} of copies are there, "
            f"{_shown(status.f_bavail * status.f_frsize)} are free on the disk). Raise data.cache.max_size, or set "
            "data.cache.dir to a larger disk"
        )

    def _entries(self) -> list[tuple[int, int, str]]:
        """(bytes, last use in ns, name) of all copies and parts."""
        entries = []
        for folder, prefix in ((self.directory, ""), (self.directory / SPOOL, f"{SPOOL}/")):
            with os.scandir(folder) as found:
                for entry in found:
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if entry.name != _LOCKS and entry.is_file(follow_symlinks=False):
                        entries.append((status.st_size, status.st_mtime_ns, prefix + entry.name))
        return entries

    def _remove_leftovers(self) -> None:
        """Remove what processes were writing that are dead now: nobody holds its lock."""
        for _, _, name in self._entries():
            if name.endswith(_PART):
                with byte_lock(self._locks, name.removesuffix(_PART), wait=False) as is_free:
                    if is_free:
                        self.path(name).unlink(missing_ok=True)


def _shown(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 10**8 else f"{num_bytes / 1e6:.1f} MB"
