"""Rows of Hugging Face datasets, by number or as a stream; images and videos stay encoded."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from vlm_dist.config.data import DataSource
from vlm_dist.data.shards.build.records import Held, Record
from vlm_dist.data.shards.build.settings import BuildSettings
from vlm_dist.data.sources.hf_dataset import cache_folders, load_rows, media_feature_kind, own_folders, plain_value
from vlm_dist.data.storage.find import find_files
from vlm_dist.errors import DataError

_ROWS_PER_READ = 256


class RowRecords:
    """Rows by number.

    Raises:
        DataError: if the data set cannot be loaded, or has no rows.
    """

    def __init__(self, settings: BuildSettings) -> None:
        self.name = _name(settings)
        source = _source(settings)
        dataset = load_rows(self.name, source)
        if not len(dataset):
            raise DataError(f"{self.name}: the data set has no rows")
        self._features = dict(dataset.features)
        self.typed = _typed(self._features)
        self.media_root = _folder(settings)
        self.own_folders: Sequence[Path] = [*own_folders(source), *cache_folders(dataset)]
        self._rows = dataset.with_format("arrow")
        self.stamp = f"{len(dataset)}/{dataset._fingerprint}"

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, number: int) -> Record:
        """Read one row."""
        row = self._rows[number].to_pylist()[0]
        return self._record(number, {name: plain_value(self._features[name], value) for name, value in row.items()})

    def outline(self, numbers: Sequence[int]) -> Iterator[Record]:
        """Read rows, in the order of their numbers, without the bytes of their images and videos."""
        wanted = np.unique(np.asarray(numbers, dtype=np.int64))
        for block in np.unique(wanted // _ROWS_PER_READ).tolist():
            start, stop = block * _ROWS_PER_READ, min((block + 1) * _ROWS_PER_READ, len(self))
            table = self._rows[start:stop]  # a slice is a view: nothing is copied before it is looked at
            media = {name: _outlines(table.column(name)) for name in self.typed}
            others = table.drop_columns(list(self.typed))
            rows = others.to_pylist() if others.num_columns else [{}] * (stop - start)
            for number in wanted[(wanted >= start) & (wanted < stop)].tolist():
                fields = {
                    name: plain_value(self._features[name], value) for name, value in rows[number - start].items()
                }
                yield self._record(number, {**fields, **{name: held[number - start] for name, held in media.items()}})

    def _record(self, number: int, fields: Mapping[str, Any]) -> Record:
        return Record(number, f"row {number}", {name: fields[name] for name in self._features})


class RowStream:
    """Rows one after the other.

    Raises:
        DataError: if the data set cannot be loaded.
    """

    def __init__(self, settings: BuildSettings) -> None:
        self.name = _name(settings)
        source = _source(settings)
        stream = load_rows(self.name, source, streaming=True)
        self._features = dict(stream.features or {})
        self.typed = _typed(self._features)
        self.media_root = _folder(settings)
        self.own_folders = own_folders(source)
        if isinstance(stream, datasets.Dataset):  # what save_to_disk wrote
            stream = stream.to_iterable_dataset()
        self._stream = stream.decode(False) if self.typed else stream

    def __iter__(self) -> Iterator[Record]:
        try:
            for number, row in enumerate(self._stream):
                fields = {name: plain_value(self._features.get(name), value) for name, value in row.items()}
                yield Record(number, f"row {number}", fields)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{self.name}: the stream failed: {error}") from error


def _name(settings: BuildSettings) -> str:
    return str(settings.path or settings.name)


def _source(settings: BuildSettings) -> DataSource:
    """Write the settings as an entry of data_config.yaml; `datasets` is given the files that a pattern means."""
    path = settings.path
    if path is not None and set("*?[{") & set(path) and not Path(path).exists():
        files = [str(file) for file in find_files("--path", path, ())]
        return DataSource(type="hf", data_files=files, split=settings.split)
    return DataSource(type="hf", path=path, name=settings.name, split=settings.split)


def _typed(features: Mapping[str, Any]) -> dict[str, str]:
    return {name: kind for name, feature in features.items() if (kind := media_feature_kind(feature))}


def _folder(settings: BuildSettings) -> Path | None:
    """The folder of local data; data of the hub has none."""
    if settings.path is None:
        return None
    path = Path(re.split(r"[*?\[{]", settings.path)[0] or ".")
    return path if path.is_dir() else path.parent if path.parent.is_dir() else None


def _outlines(column: pa.ChunkedArray) -> list[Any]:
    """Return the media of each row of a column as `Held`, or as a path where there are no bytes, or a list of them.

    Of the bytes only the bitmap is looked at that says where there are any.
    """
    found: list[Any] = []
    for array in column.chunks:
        if not isinstance(array, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
            found += _outline_items(array)
            continue
        items = iter(_outline_items(array.flatten()))  # without those of rows that are null
        for size in array.value_lengths().to_pylist():
            found.append(None if size is None else list(itertools.islice(items, size)))
    return found


def _outline_items(array: pa.Array) -> list[Any]:
    if not isinstance(array, pa.StructArray):
        return [Held() if isinstance(item, bytes) else item for item in array.to_pylist()]
    is_item = array.is_valid().to_pylist()
    has_bytes = array.field("bytes").is_valid().to_pylist()
    if all(has_bytes):
        return [Held() if there else None for there in is_item]
    paths = array.field("path").to_pylist()
    return [
        (Held() if held else path) if there else None
        for there, held, path in zip(is_item, has_bytes, paths, strict=True)
    ]
