"""One process at a time works on something that many could start, on one machine or on several with a shared disk.

A kernel lock would not do: not every shared file system hands locks from machine to machine. A lease is a file that
only one can create and whose owner keeps touching it as its work goes on. It only saves work: who loses it by mistake
does the same work beside the other, and the first result stays.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from pathlib import Path

logger = logging.getLogger(__name__)

#: A lease whose owner made no progress for so long is taken over; one tensor on a slow disk must take less.
STALE_SECONDS = 300.0
_POLL_SECONDS = 0.2
_LINE_SECONDS = 60.0


class Lease:
    """Holds the right to make a target; see `acquire`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"

    @classmethod
    def acquire(cls, target: Path, doing: str) -> Lease | None:
        """Wait until the target is there or the right to make it is ours.

        The wait ends: the owner goes on, or its lease is taken over, at once where its process on this machine is
        gone, else when it has made no progress for `STALE_SECONDS`.

        Args:
            target: what will be there when the work is done.
            doing: for the log, such as "converting X".

        Returns:
            The lease; None if another has finished the work.
        """
        lease = cls(target.with_name(f".{target.name}.lease"))
        start = last_line = last_change = time.monotonic()
        seen: tuple[str, int] | None = None
        while not target.exists():
            if lease._create():
                if target.exists():  # finished between the two looks
                    lease.release()
                    return None
                return lease
            state, now = lease._state(), time.monotonic()
            if state != seen:
                seen, last_change = state, now
            if state is not None and (_is_gone(state[0]) or now - last_change > STALE_SECONDS):
                logger.warning("%s: %s is gone or makes no progress; taking over", doing, _name(state[0]))
                lease._take_away()
                continue
            if now - last_line >= _LINE_SECONDS and state is not None:
                last_line = now
                logger.info("waiting for %s, which is %s, %.0f min so far", _name(state[0]), doing, (now - start) / 60)
            time.sleep(_POLL_SECONDS)
        return None

    def touch(self) -> None:
        """Tell those who wait that the work goes on."""
        try:
            os.utime(self._file)
        except FileNotFoundError:  # taken over: the work goes on, and the first to finish wins
            logger.warning("%s was taken over by another process", self._file)

    def release(self) -> None:
        """Give it back, unless another has it by now."""
        state = self._state()
        if state is not None and state[0] == self._owner:
            self._file.unlink(missing_ok=True)

    def _create(self) -> bool:
        # written in full before it has its name, so that nobody reads half an owner
        draft = self._file.with_name(f"{self._file.name}.{uuid.uuid4().hex}")
        draft.write_text(self._owner, encoding="utf-8")
        try:
            os.link(draft, self._file)
        except FileExistsError:
            return False
        except OSError:  # no hard links on this file system
            return self._create_alone()
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _create_alone(self) -> bool:
        try:
            with self._file.open("x", encoding="utf-8") as stream:
                stream.write(self._owner)
        except FileExistsError:
            return False
        return True

    def _state(self) -> tuple[str, int] | None:
        try:
            return self._file.read_text(encoding="utf-8"), self._file.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _take_away(self) -> None:
        aside = self._file.with_name(f"{self._file.name}.{uuid.uuid4().hex}")
        try:
            self._file.rename(aside)  # of several who try, one succeeds
        except FileNotFoundError:
            return
        aside.unlink(missing_ok=True)


def _is_gone(owner: str) -> bool:
    """Whether the owner was a process of this machine that has ended."""
    host, _, rest = owner.partition(":")
    process = rest.partition(":")[0]
    if host != socket.gethostname() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _name(owner: str) -> str:
    host, _, rest = owner.partition(":")
    return f"process {rest.partition(':')[0]} on {host}"
