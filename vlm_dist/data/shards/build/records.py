"""Records as a build reads them: rows of Hugging Face datasets, JSON objects, samples of tars."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlm_dist.data.shards.build.settings import BuildSettings
from vlm_dist.data.sources.json_records import RecordPlaces, json_records, parse_record, record_problem
from vlm_dist.data.storage.find import find_files
from vlm_dist.data.storage.open_files import OpenFiles
from vlm_dist.errors import DataError


@dataclass(frozen=True, slots=True)
class Record:
    """One record.

    Attributes:
        number: its place in the source, from 0.
        where: says to a person where it is.
        fields: column (or tar member) -> value; None where it is damaged.
        key: what the source itself calls it.
        problem: why it is damaged.
    """

    number: int
    where: str
    fields: dict[str, Any] | None
    key: str | None = None
    problem: str = ""


class Held:
    """Stands for the bytes of an image or video that the source holds, where they are not to be read yet."""


class Records(Protocol):
    """Records that can be read by number, by many threads at once."""

    name: str
    stamp: str  # changes when the records do
    typed: dict[str, str]  # columns of Image or Video type -> kind
    media_root: Path | None  # the folder that media paths start in, unless the settings name one
    own_folders: Sequence[Path]  # where paths in columns of Image or Video type may lead

    def __len__(self) -> int: ...

    def read(self, number: int) -> Record:
        """Read one record."""

    def outline(self, numbers: Sequence[int]) -> Iterator[Record]:
        """Read records, numbers ascending, with `Held` in the place of the images and videos that they hold."""


def open_records(settings: BuildSettings) -> Records:
    """Open what is read by number.

    Raises:
        DataError: if there is no such data, or it is damaged as a whole.
    """
    if settings.type == "jsonl":
        return JsonRecords(settings)
    if settings.type == "tar":
        from vlm_dist.data.shards.build.tar_records import TarRecords

        return TarRecords(str(settings.path), settings.skip_bad)
    from vlm_dist.data.shards.build.hf_records import RowRecords  # imports datasets

    return RowRecords(settings)


class JsonRecords:
    """Lines of .jsonl files or elements of .json lists.

    Raises:
        DataError: if there is no such file, or it has no records.
    """

    def __init__(self, settings: BuildSettings) -> None:
        pattern = str(settings.path)
        self.name = pattern
        self.typed: dict[str, str] = {}
        paths = find_files("--path", pattern, (".jsonl", ".ndjson", ".json"))
        self.media_root: Path | None = paths[0].parent
        self.own_folders: Sequence[Path] = ()
        self._paths = paths
        self._files = OpenFiles(paths)
        spans: list[tuple[int, int, int]] = []
        self._places: list[RecordPlaces] = []
        content = hashlib.sha256()
        for number, path in enumerate(paths):
            before = len(spans)
            self._places.append(RecordPlaces.to_fill())
            for record in json_records(str(path), path):
                content.update(record.data)
                spans.append((number, record.offset, len(record.data)))
                self._places[-1].add(record)
            content.update(f"{len(spans) - before}".encode())
        if not spans:
            raise DataError(f"{pattern}: {'the file is empty' if _are_empty(paths) else 'no records'}")
        self._spans = np.array(spans, dtype=np.int64)
        self._first = np.searchsorted(self._spans[:, 0], np.arange(len(paths)))  # number of a file's first record
        self.stamp = content.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, number: int) -> Record:
        """Read one record."""
        file, offset, size = self._spans[number].tolist()
        where = f"{self._paths[file].name}:{self._places[file](number - int(self._first[file]))}"
        data = self._files.read(file, offset, size)
        fields = parse_record(data)
        return Record(number, where, fields, problem=record_problem(data) if fields is None else "")

    def outline(self, numbers: Sequence[int]) -> Iterator[Record]:
        """Read records; JSON holds no bytes."""
        return map(self.read, numbers)


def _are_empty(paths: Sequence[Path]) -> bool:
    return len(paths) == 1 and paths[0].stat().st_size == 0


def stamp_of_files(paths: Sequence[Path]) -> str:
    """Name a set of files by their names, sizes and times."""
    rows = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]
