"""JSON records: lines of a .jsonl file or elements of a .json list, read by offset; media columns are paths."""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.index.facts import SampleFacts
from vlm_dist.data.index.manifest import Manifest, ShardEntry
from vlm_dist.data.index.shard_index import SampleSpan, ShardIndex, build_index, keep_index, read_index, sidecar_paths
from vlm_dist.data.sources.columns import ColumnNames, SourceSettings, build_command, setting, source_name
from vlm_dist.data.sources.json_records import RecordPlaces, json_records, parse_record, record_problem
from vlm_dist.data.sources.media import MediaColumns, MediaRoot
from vlm_dist.data.sources.rows import BlockRows, limited_sizes
from vlm_dist.data.storage.find import find_files
from vlm_dist.data.storage.open_files import OpenFiles
from vlm_dist.data.types import RawSample, SampleOrigin
from vlm_dist.errors import DataError, SkipSample

_RECORD = "record"
_STAMP_VERSION = 2  # of what an index of records remembers
_MAX_EXAMPLES = 3

log = logging.getLogger(__name__)


class JsonSource(BlockRows):
    """Records of local JSON files.

    Args:
        name: of the source, for people.
        paths: the files.
        indexes: one index per file.
        media: reads the media columns.
        renames: new column -> own column.
        max_samples: use only the first so many.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        indexes: Sequence[ShardIndex],
        media: MediaColumns,
        renames: Mapping[str, str] | None = None,
        max_samples: int | None = None,
    ) -> None:
        self._files = OpenFiles(paths)
        self._spans = [np.stack([index.offsets[_RECORD], index.sizes[_RECORD]], axis=1) for index in indexes]
        self._facts = np.concatenate([index.facts for index in indexes])
        self._places = [RecordPlaces.of_notes(index.notes) for index in indexes]
        media_names = {column for index in indexes for column in index.notes["media_columns"]}
        fields = dict.fromkeys(field for index in indexes for field in index.json_fields)
        *self._starts, num_rows = [0, *accumulate(limited_sizes([len(index) for index in indexes], max_samples))]
        # where the facts of each file start: of all of its records, while a source of max_samples has fewer rows
        self._shifts = np.cumsum([0, *map(len, self._spans[:-1])]) - np.asarray(self._starts)
        entries = (ShardEntry.of(path.name, index) for path, index in zip(paths, indexes, strict=True))
        self._named_digests = [(path.name, index.digest) for path, index in zip(paths, indexes, strict=True)]
        digest = Manifest(tuple(entries)).hash + ("" if max_samples is None else f":{max_samples}")
        super().__init__(name, ColumnNames(name, list(fields), renames), num_rows, digest, media, media_names)

    @classmethod
    def open(
        cls, settings: SourceSettings, index_dir: Path | None = None, media_columns: frozenset[str] | None = None
    ) -> Self:
        """Open the files that `path` or `data_files` means; those without an index are read once to make it."""
        patterns = _patterns(settings)
        name = source_name(settings, patterns[0] if patterns else "")
        if not patterns:
            raise DataError(f"{name}: a jsonl source needs path or data_files (a .jsonl file, a .json list, a glob)")
        paths = [path for pattern in patterns for path in find_files(name, pattern, (".jsonl", ".ndjson", ".json"))]
        folder = Path(setting(settings, "media_root", paths[0].parent))
        root = MediaRoot(name, folder, build_command=build_command(settings, patterns[0]))
        renames = setting(settings, "columns", {})
        declared = None if media_columns is None else frozenset(renames.get(column, column) for column in media_columns)
        indexes = [_load_or_scan(name, path, index_dir, root, declared) for path in paths]
        media = MediaColumns(root, declared)
        return cls(name, paths, indexes, media, renames, setting(settings, "max_samples"))

    @property
    def files(self) -> Sequence[tuple[str, str]]:
        """Name and digest of every file."""
        return self._named_digests

    def facts(self, rows: NDArray[np.int64]) -> NDArray[np.void]:
        """Length facts per row."""
        rows = np.asarray(rows)
        files = np.searchsorted(self._starts, rows, side="right") - 1
        facts: NDArray[np.void] = self._facts[rows + self._shifts[files]]
        return facts

    def origin(self, index: int) -> SampleOrigin:
        """Say where a record is: its file, and its line in it or, in a list, its number; both from 1."""
        number, row = self._locate(index)
        return SampleOrigin(self.name, Path(self._files.paths[number]).name, self._places[number](row))

    def read(self, index: int) -> RawSample:
        """Read one record and the files of its media columns.

        Raises:
            SkipSample: if the record is no JSON object, a media file does not exist, or its path is refused.
            DataError: if the storage fails.
        """
        number, row = self._locate(index)
        origin = self.origin(index)
        offset, size = self._spans[number][row].tolist()
        data = self._files.read(number, offset, size)
        record = parse_record(data)
        if record is None:
            raise SkipSample("bad_sample", f"{origin}: the record is not a JSON object ({record_problem(data)})")
        return self._sample(record, origin)

    def _locate(self, index: int) -> tuple[int, int]:
        self._check(index)
        number = bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]


def _patterns(settings: SourceSettings) -> list[str]:
    files = setting(settings, "data_files", setting(settings, "path", []))
    if isinstance(files, Mapping):
        split = setting(settings, "split", "train")
        if split not in files:
            raise DataError(f"data_files has no split {split!r}; it has: {', '.join(files)}")
        files = files[split]
    return [str(files)] if isinstance(files, str | Path) else [str(file) for file in files]


def _load_or_scan(
    name: str, path: Path, index_dir: Path | None, root: MediaRoot, declared: frozenset[str] | None
) -> ShardIndex:
    """Read a file's index, or make it and keep it under `index_dir`, else beside the file."""
    status = path.stat()
    stamp = json.dumps(
        [
            _STAMP_VERSION,
            status.st_size,
            status.st_mtime_ns,
            str(root.root and root.root.resolve()),
            declared and sorted(declared),
        ]
    )
    places = sidecar_paths(path, index_dir)[::-1]
    for place in places:
        index = read_index(place)
        if index is not None and index.stamp == stamp:
            return index
    index = replace(_scan(name, path, MediaColumns(root, declared)), stamp=stamp)
    keep_index(index, places)
    return index


def _scan(name: str, path: Path, media: MediaColumns) -> ShardIndex:
    where = f"{name}: {path}"
    spans: list[SampleSpan] = []
    places = RecordPlaces.to_fill()
    bad: list[int] = []
    problem = ""  # of the first bad one
    content = hashlib.sha256()
    for row, stored in enumerate(json_records(where, path)):
        content.update(stored.data)
        places.add(stored)
        record = parse_record(stored.data)
        if record is None:
            bad.append(row)
            problem = problem or record_problem(stored.data)
            facts = SampleFacts()
            facts.add_text(len(stored.data))
        else:
            facts = media.facts_of(record, f"{path.name}:{places(row)}")
        span = (stored.offset, len(stored.data))
        spans.append(SampleSpan("", {_RECORD: span}, facts.row, tuple(record or ())))
    if not spans:
        raise DataError(f"{where}: the file {'is empty' if path.stat().st_size == 0 else 'has no records'}")
    first = ", ".join(f"{path.name}:{places(row)}" for row in bad[:_MAX_EXAMPLES]) + f" ({problem})"
    if 2 * len(bad) > len(spans):
        raise DataError(
            f"{where}: {len(bad)} of {len(spans)} records are no JSON objects, first {first}; expected one object per "
            "line, or a list"
        )
    if bad:
        log.warning(
            "%s: %d of %d records are no JSON objects and will be skipped, first %s",
            where, len(bad), len(spans), first,
        )  # fmt: skip
    media.check_missing(where)
    notes = {"media_columns": sorted(media.names), "content": content.hexdigest(), **places.notes}
    return build_index(spans, path.stat().st_size, notes)
