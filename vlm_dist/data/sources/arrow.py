"""Hugging Face datasets: Arrow tables by row, with undecoded images and videos."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import datasets
import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.index.manifest import Manifest, ShardEntry
from vlm_dist.data.index.shard_index import INDEX_SUFFIX, SampleSpan, ShardIndex, build_index, keep_index, read_index
from vlm_dist.data.sources.columns import ColumnNames, SourceSettings, setting, source_name
from vlm_dist.data.sources.media import MediaColumns, MediaRoot
from vlm_dist.data.sources.shards import block_digests, locate_in_blocks, row_blocks
from vlm_dist.data.types import RawSample, SampleOrigin
from vlm_dist.errors import DataError

_ROWS_PER_READ = 64
#: Builders of `datasets` by the ending of a local file.
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json"}
_FOLDER_BUILDERS = ("imagefolder", "videofolder")
_LOCAL_PATH = re.compile(r"^[./~]")


class ArrowSource:
    """Rows of a `datasets.Dataset`.

    Args:
        name: of the source, for people.
        dataset: with a known length; a streamed one is refused.
        index_dir: where the facts of the rows are kept.
        media_root: what paths in columns of strings are relative to.
        media_columns: columns with paths of media, by their own names; None finds them by their values.
        renames: new column -> own column.
        max_samples: use only the first so many.
    """

    def __init__(
        self,
        name: str,
        dataset: datasets.Dataset,
        index_dir: Path | None = None,
        media_root: Path | None = None,
        media_columns: frozenset[str] | None = None,
        renames: Mapping[str, str] | None = None,
        max_samples: int | None = None,
    ) -> None:
        if not isinstance(dataset, datasets.Dataset):
            raise DataError(
                f"{name}: a {type(dataset).__name__} cannot be read by row, so a run could not resume exactly; "
                "write it into tar shards once, with vlm_dist.data.shards.writer.ShardWriter"
            )
        self.name = name
        if max_samples is not None and max_samples < len(dataset):
            dataset = dataset.select(range(max_samples))
        # rows as they are stored: no image is decoded, and no column is cast (that would rewrite the table)
        self._dataset = dataset.with_format("arrow")
        typed = {column: kind for column, feature in dataset.features.items() if (kind := _media_kind(feature))}
        self._columns = ColumnNames(name, dataset.column_names, renames)
        self._media = MediaColumns(MediaRoot(name, media_root), media_columns, typed)
        index = self._load_or_scan(index_dir)
        self._media_names = frozenset(index.notes["media_columns"])
        self._facts = index.facts
        self._hash = Manifest((ShardEntry.of("arrow", index),)).hash

    @classmethod
    def open(
        cls, settings: SourceSettings, index_dir: Path | None = None, media_columns: frozenset[str] | None = None
    ) -> Self:
        """Load a `save_to_disk` directory, local files, or a hub data set, as `path`, `name` and `data_files` say."""
        path, files = setting(settings, "path"), setting(settings, "data_files")
        name = source_name(settings, str(path or ""))
        if path is None and files is None and setting(settings, "name") is None:
            raise DataError(f"{name}: an hf source needs path (a save_to_disk directory) or name (of a hub data set)")
        dataset = _load(name, settings)
        renames = setting(settings, "columns", {})
        declared = None if media_columns is None else frozenset(renames.get(column, column) for column in media_columns)
        root = setting(settings, "media_root")
        return cls(
            name,
            dataset,
            index_dir,
            None if root is None else Path(root),
            declared,
            renames,
            setting(settings, "max_samples"),
        )

    def keep_columns(self, used: Collection[str]) -> None:
        """Read no column but these."""
        self._columns.keep(used)
        kept = [name for name in self._dataset.column_names if self._columns.is_kept(name)]
        self._dataset = self._dataset.select_columns(kept)
        self._media_names = self._media_names.intersection(kept)

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the data set, renamed."""
        return self._columns.names

    @property
    def manifest_hash(self) -> str:
        """Hex digest over the number of rows and their facts; moving the data does not change it."""
        return self._hash

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Blocks of rows: any row is as cheap as the next."""
        return row_blocks(len(self))

    @property
    def shard_digests(self) -> Sequence[str]:
        """One digest per block of rows."""
        return block_digests(self._hash, len(self))

    def facts(self, rows: NDArray[np.int64]) -> NDArray[np.void]:
        """Length facts per row."""
        facts: NDArray[np.void] = self._facts[np.asarray(rows)]
        return facts

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find the block of each row, and its row within the block."""
        return locate_in_blocks(rows)

    def will_read(self, rows: NDArray[np.int64]) -> None:
        """Nothing to do: the tables are mapped into memory."""

    def origin(self, index: int) -> SampleOrigin:
        """Name a row by its number."""
        return SampleOrigin(self.name, str(self._dataset.split or "rows"), str(index))

    def read(self, index: int) -> RawSample:
        """Read one row; images and videos as bytes.

        Raises:
            SkipSample: if a media file does not exist.
            DataError: if the storage fails or a path is refused.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: row {index} of {len(self)}")
        row = self._plain(self._dataset[index].to_pylist()[0])
        return RawSample(self._columns.apply(self._media.load(self._media_names, row)), self.origin(index))

    def _plain(self, row: dict[str, Any]) -> dict[str, Any]:
        return {column: _plain(self._dataset.features[column], value) for column, value in row.items()}

    def _load_or_scan(self, index_dir: Path | None) -> ShardIndex:
        fingerprint = str(self._dataset._fingerprint)
        root = self._media.root.root
        stamp = f"{len(self._dataset)}/{root and root.resolve()}/{sorted(self._media.declared or ())}"
        place = index_dir / "hf" / (fingerprint + INDEX_SUFFIX) if index_dir is not None else None
        index = read_index(place) if place is not None else None
        if index is not None and index.stamp == stamp:
            return index
        spans: list[SampleSpan] = []
        for batch in self._dataset.iter(batch_size=_ROWS_PER_READ):
            spans.extend(SampleSpan("", {}, self._media.facts_of(self._plain(row)).row) for row in batch.to_pylist())
        if not spans:
            raise DataError(f"{self.name}: the data set has no rows")
        self._media.check_missing(self.name)
        notes = {"media_columns": sorted(self._media.names), "columns": self._dataset.column_names}
        index = replace(build_index(spans, 0, notes), stamp=stamp)
        keep_index(index, [place] if place is not None else [])
        return index


def _load(name: str, settings: SourceSettings) -> Any:
    """Load the data set that the settings mean, and choose its split."""
    path, split = setting(settings, "path"), setting(settings, "split")
    if path is not None and _LOCAL_PATH.match(path) and not Path(path).exists():
        raise DataError(f"{name}: there is no {path} (looked from {Path.cwd()})")
    try:
        if path is not None and _is_saved(Path(path)):
            return _choose_split(name, datasets.load_from_disk(path), split)
        builder, files = _builder_and_files(name, settings)
        return _choose_split(name, datasets.load_dataset(builder, data_files=files, split=split), split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name}: cannot load the data set {path or setting(settings, 'name')!r}: {error}. Check its name and, "
            "for a gated one, your login; on a machine without network give a local directory as path"
        ) from error


def _builder_and_files(name: str, settings: SourceSettings) -> tuple[str, Any]:
    """Return the first argument of `load_dataset` and its `data_files`."""
    path, files = setting(settings, "path"), setting(settings, "data_files")
    if path is not None and Path(path).is_file():
        return _builder_of(name, path), path
    target = path or setting(settings, "name")
    if files is None or (path is not None and Path(path).exists()):
        return str(target), files
    if target is not None and ("/" in target or target in _BUILDERS.values() or target in _FOLDER_BUILDERS):
        return str(target), files
    return _builder_of(name, files), files  # the name is only a label


def _builder_of(name: str, files: Any) -> str:
    first = files
    while not isinstance(first, str):
        first = next(iter(first.values())) if isinstance(first, Mapping) else first[0]
    builder = _BUILDERS.get(Path(first).suffix.lower())
    if builder is None:
        raise DataError(f"{name}: {first!r} has no ending that says how to read it; known: {', '.join(_BUILDERS)}")
    return builder


def _is_saved(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _choose_split(name: str, loaded: Any, split: str | None) -> Any:
    if not isinstance(loaded, Mapping):
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    chosen = split or "train"
    if chosen not in loaded:
        raise DataError(f"{name}: there is no split {chosen!r}; set split to one of: {', '.join(map(str, loaded))}")
    return loaded[chosen]


def _media_kind(feature: Any) -> str | None:
    """Return "image" or "video" for a media type or a list of one."""
    if isinstance(feature, datasets.Image):
        return "image"
    if isinstance(feature, datasets.Video):
        return "video"
    element = _element(feature)
    return _media_kind(element) if element is not None else None


def _element(feature: Any) -> Any:
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", None)


def _plain(feature: Any, value: Any) -> Any:
    """Turn a stored value into a plain one: media into bytes or a path, Json into what it encodes."""
    if value is None:
        return None
    if isinstance(feature, datasets.Image | datasets.Video):
        return value.get("bytes") or value.get("path") if isinstance(value, Mapping) else value
    if type(feature).__name__ == "Json":  # newer than the oldest datasets that we support
        return json.loads(value) if isinstance(value, str) else value
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {key: _plain(feature.get(key), item) for key, item in value.items()}
    element = _element(feature)
    if element is not None and isinstance(value, list):
        return [_plain(element, item) for item in value]
    return value
