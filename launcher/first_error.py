"""What a rank's log says of its end: the few lines that its user needs."""

from __future__ import annotations

import re
from pathlib import Path

#: So much of the end of a log is looked at: what counts is said last.
_TAIL_BYTES = 256 * 1024
#: More lines than these are left out, from the middle.
MAX_LINES = 40
_NUM_LAST_WORDS = 6

_ERROR = re.compile(r"error(?: \(rank \d+\))?: ")
#: As the ranks that are left say it; see `vlm_dist.distributed.watchdog`.
_LOST_PEER = re.compile(
    r"error(?: \(rank \d+\))?: another rank is gone: rank (\d+)(?: has left at|, last heard of) "
    r"|rank \d+ ends with the others, as rank (\d+) says"
)
#: The first line, of `launcher.slurm_rank`.
_HEADER = re.compile(r"rank \d+ on \S+, \d{4}-")
_TRACEBACK = "Traceback (most recent call last):"
#: Between the tracebacks of one chain.
_CHAIN = re.compile(r"During handling of the above|The above exception was the direct cause")


def read_tail(log: Path) -> list[str]:
    """The last lines of a log, without those that are empty; none where there is no log."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()]


def blamed_rank(lines: list[str]) -> int | None:
    """The other rank whose loss, or whose word, is the first error of a log; None: the error is the rank's own."""
    for line in lines:
        lost = _LOST_PEER.match(line)
        if lost is not None:
            return int(lost[1] or lost[2])
        if _ERROR.match(line):
            return None
    return None


def first_error(lines: list[str]) -> list[str]:
    """From the first error that the trainer has told, to the end; else the last traceback; else nothing.

    Libraries print tracebacks of errors that they get over: of those only the last one can be why a rank has ended.
    """
    for number, line in enumerate(lines):
        if _ERROR.match(line):
            return lines[number:]
    starts = [number for number, line in enumerate(lines) if line.startswith(_TRACEBACK)]
    if not starts:
        return []
    start = starts.pop()
    while starts and any(_CHAIN.match(line) for line in lines[starts[-1] : start]):
        start = starts.pop()
    return lines[start:]


def last_words(lines: list[str]) -> list[str]:
    """The last lines, of a rank that had no time for an error."""
    return [line for line in lines[-_NUM_LAST_WORDS:] if not _HEADER.match(line)]


def shortened(lines: list[str]) -> list[str]:
    """With the middle left out, where it is long: what an error is called stands first or last."""
    if len(lines) <= MAX_LINES:
        return lines
    head = MAX_LINES // 4
    tail = MAX_LINES - head
    return [*lines[:head], f"… ({len(lines) - MAX_LINES} lines)", *lines[-tail:]]
