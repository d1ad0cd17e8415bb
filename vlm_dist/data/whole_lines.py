"""Where the whole lines of a file end: a process that is killed leaves half of one behind."""

from __future__ import annotations

import os
from pathlib import Path

_BLOCK_BYTES = 65_536


def end_of_lines(path: Path, end: int | None = None) -> int:
    """Bytes of a file up to the end of its last whole line.

    Args:
        path: of the file.
        end: look only at so many bytes from its beginning; None: at all.
    """
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END) if end is None else end
        while end > 0:
            start = max(0, end - _BLOCK_BYTES)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0
