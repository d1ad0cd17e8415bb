"""Records that cannot be used: their classes, how they are counted, and the report that names them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from vlm_dist.errors import DataError

#: Why a record cannot be used.
BAD_CLASSES = {
    "malformed": "no JSON object, or damaged",
    "missing_media": "a media file does not exist",
    "bad_media": "an image or video whose header cannot be read, or too large a file",
    "outside": "a path that leads out of media_root",
    "fetch": "a URL that could not be fetched",
    "conversation": "turns, roles, or markers that do not fit the media",
    "key": "no usable key",
    "members": "members that do not fit those of the other samples",
    "unwritable": "a value that JSON cannot hold",
    "empty": "no columns",
}
_NUM_SHOWN = 5


class BadRecord(Exception):  # noqa: N818 - a signal to the build, never shown as an error by itself
    """One record cannot be used.

    Args:
        bad_class: one of BAD_CLASSES.
        message: what is wrong with it.
    """

    def __init__(self, bad_class: str, message: str) -> None:
        super().__init__(message)
        assert bad_class in BAD_CLASSES
        self.bad_class = bad_class
        self.message = message


@dataclass
class BadRecords:
    """Counts bad records, keeps the first, and writes all of them to the report.

    Attributes:
        report: JSON lines; made when there is something to write.
        num_bytes: of the report; what is behind them is cut off before the next line is written.
    """

    report: Path
    counts: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0
    _first: list[str] = field(default_factory=list)
    _lines: list[bytes] = field(default_factory=list)

    def add(self, number: int, where: str, error: BadRecord) -> None:
        """Count a record; `where` says to a person which one it is, `number` is its place in the source, from 0."""
        self.counts[error.bad_class] += 1
        if len(self._first) < _NUM_SHOWN:
            self._first.append(f"{where}: {error.message}")
        line = {"record": number, "where": where, "class": error.bad_class, "message": error.message}
        self._lines.append(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")

    def flush(self) -> None:
        """Write what was counted since the last time."""
        if not self._lines:
            return
        self.report.parent.mkdir(parents=True, exist_ok=True)
        with self.report.open("r+b" if self.report.exists() else "wb") as stream:
            stream.truncate(self.num_bytes)
            stream.seek(self.num_bytes)
            stream.writelines(self._lines)
            self.num_bytes = stream.tell()
        self._lines.clear()

    def refuse(self, total: int) -> None:
        """Raise if there are any.

        Args:
            total: number of records that were looked at.

        Raises:
            DataError: with the number of each class and the first records.
        """
        num_bad = self.counts.total()
        if not num_bad:
            return
        self.flush()
        classes = "\n".join(f"  {count} x {name}: {BAD_CLASSES[name]}" for name, count in self.counts.most_common())
        more = f"\n  … {num_bad - len(self._first)} more" if num_bad > len(self._first) else ""
        raise DataError(
            f"{num_bad} of {total} records cannot be used:\n{classes}\nthe first:\n"
            + "\n".join(f"  {line}" for line in self._first)
            + f"{more}\nAll are listed in {self.report}. Mend them, or leave them out with --skip-bad"
        )
