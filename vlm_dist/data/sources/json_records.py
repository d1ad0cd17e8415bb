"""The records of JSON files: where each lies, in bytes for the machine and in lines for a person."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_dist.errors import DataError

_SPACE = " \t\r\n"


class JsonRecord(NamedTuple):
    """One record as it is stored.

    Attributes:
        offset: of its data, in bytes.
        data: of the record alone.
        line: that it stands in, from 1; None for the elements of a list, of which a line may hold many.
    """

    offset: int
    data: bytes
    line: int | None


def json_records(where: str, path: Path) -> Iterator[JsonRecord]:
    """Yield every line that is not empty, or every element of a list.

    Raises:
        DataError: the file is compressed, or a list that breaks off.
    """
    if path.name.endswith((".gz", ".zst", ".xz", ".bz2")):
        raise DataError(f"{where}: compressed files cannot be read by offset; decompress it")
    with path.open("rb") as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        stream.seek(0)
        if start.startswith(b"["):
            yield from _list_elements(where, stream.read())
            return
        offset = 0
        for number, line in enumerate(stream, 1):
            record = line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line
            if record.strip():
                yield JsonRecord(offset + len(line) - len(record), record.rstrip(), number)
            offset += len(line)


def _list_elements(where: str, data: bytes) -> Iterator[JsonRecord]:
    decoder = json.JSONDecoder()
    try:
        text = data.decode("utf-8")
        position = text.index("[") + 1
        offset = len(text[:position].encode())  # in bytes, while positions are in characters
        while True:
            start = position
            while position < len(text) and text[position] in _SPACE + ",":
                position += 1
            offset += position - start  # separators are ASCII
            if text[position : position + 1] == "]":
                return
            _, stop = decoder.raw_decode(text, position)
            element = text[position:stop].encode()
            yield JsonRecord(offset, element, None)
            position, offset = stop, offset + len(element)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a valid JSON list: {error}") from error


def parse_record(data: bytes) -> dict[str, Any] | None:
    """Parse one record; None where it is no JSON object."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def record_problem(data: bytes) -> str:
    """Say why something is no record."""
    try:
        value = json.loads(data)
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason} at byte {error.start}"
    except json.JSONDecodeError as error:
        end = "; does the line break off?" if not data.rstrip().endswith(b"}") else ""
        return f"not JSON: {error.msg} at character {error.pos + 1}{end}"
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    kind = {list: "a list", str: "a text", type(None): "null", bool: "true or false"}.get(type(value), "a number")
    return f'{kind}, not an object such as {{"question": …}}'


class RecordPlaces:
    """Says where a person finds the records of a file.

    Kept as a few numbers: lines follow each other, but where empty ones are between them.

    Attributes:
        shifts: (record from 0, by how much its line number is above that); None for a list.
    """

    def __init__(self, shifts: Sequence[Sequence[int]] | None = ((0, 1),)) -> None:
        self.shifts: list[tuple[int, int]] | None = None if shifts is None else [(row, by) for row, by in shifts]
        self._rows = [row for row, _ in self.shifts or ()]
        self._num_added = 0

    @classmethod
    def to_fill(cls) -> RecordPlaces:
        """Places of a file that is being read."""
        return cls(())

    @classmethod
    def of_notes(cls, notes: Mapping[str, Any]) -> RecordPlaces:
        """What an index remembers; where it says nothing, no line is empty."""
        return cls(notes["line_shifts"]) if "line_shifts" in notes else cls()

    @property
    def notes(self) -> dict[str, Any]:
        """What an index has to remember."""
        return {} if self.shifts == [(0, 1)] else {"line_shifts": self.shifts}

    def add(self, record: JsonRecord) -> None:
        """Learn where the next record is."""
        row, self._num_added = self._num_added, self._num_added + 1
        if record.line is None:
            self.shifts = None
        elif self.shifts is not None and (not self.shifts or self.shifts[-1][1] != record.line - row):
            self.shifts.append((row, record.line - row))
            self._rows.append(row)

    def __call__(self, row: int) -> str:
        """Name a record: the number of its line, or `record N` in a list; both from 1."""
        if self.shifts is None:
            return f"record {row + 1}"
        return str(row + self.shifts[bisect_right(self._rows, row) - 1][1])
