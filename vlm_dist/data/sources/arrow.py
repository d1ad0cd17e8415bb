"""Hugging Face datasets: Arrow tables by row, with undecoded images and videos."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import datasets
import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.index.manifest import Manifest, ShardEntry
from vlm_dist.data.index.shard_index import INDEX_SUFFIX, SampleSpan, ShardIndex, build_index, keep_index, read_index
from vlm_dist.data.sources.columns import ColumnNames, SourceSettings, build_command, setting, source_name
from vlm_dist.data.sources.hf_dataset import cache_folders, load_rows, media_feature_kind, own_folders, plain_value
from vlm_dist.data.sources.media import MediaColumns, MediaRoot
from vlm_dist.data.sources.rows import BlockRows
from vlm_dist.data.types import RawSample, SampleOrigin
from vlm_dist.errors import DataError

_ROWS_PER_READ = 64
_END_BYTES = 512  # of long values, what goes into the digest of the contents
_STAMP_VERSION = 2  # of what an index of rows remembers


class ArrowSource(BlockRows):
    """Rows of a `datasets.Dataset`.

    Args:
        name: of the source, for people.
        dataset: with a known length; a streamed one is refused.
        index_dir: where the facts of the rows are kept.
        media_root: what paths of media are relative to.
        media_columns: columns with paths of media, by their own names; None finds them by their values.
        renames: new column -> own column.
        max_samples: use only the first so many.
        folders: what the data set was made from; paths in columns of Image or Video type may lead there.
        command: writes it into shards; told where it cannot be trained on as it is.
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
        folders: Sequence[Path] = (),
        command: str = "vlm-dist shards build --from hf --name NAME --out DIRECTORY",
    ) -> None:
        if not isinstance(dataset, datasets.Dataset):
            raise DataError(
                f"{name}: a {type(dataset).__name__} cannot be read by row, so a run could not resume exactly; "
                f"write it into tar shards once: {command} --streaming"
            )
        if max_samples is not None and max_samples < len(dataset):
            dataset = dataset.select(range(max_samples))
        # rows as they are stored: no image is decoded, and no column is cast (that would rewrite the table)
        self._dataset = dataset.with_format("arrow")
        typed = {column: kind for column, feature in dataset.features.items() if (kind := media_feature_kind(feature))}
        root = MediaRoot(name, media_root, [*folders, *cache_folders(dataset)], command)
        media = MediaColumns(root, media_columns, typed)
        index = self._load_or_scan(name, media, index_dir)
        digest = Manifest((ShardEntry.of("arrow", index),)).hash
        columns = ColumnNames(name, dataset.column_names, renames)
        super().__init__(name, columns, len(dataset), digest, media, index.notes["media_columns"])
        self._facts = index.facts

    @classmethod
    def open(
        cls, settings: SourceSettings, index_dir: Path | None = None, media_columns: frozenset[str] | None = None
    ) -> Self:
        """Load a `save_to_disk` directory, local files, or a hub data set, as `path`, `name` and `data_files` say."""
        path, files = setting(settings, "path"), setting(settings, "data_files")
        name = source_name(settings, str(path or ""))
        if path is None and files is None and setting(settings, "name") is None:
            raise DataError(f"{name}: an hf source needs path (a save_to_disk directory) or name (of a hub data set)")
        dataset = load_rows(name, settings)
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
            own_folders(settings),
            build_command(settings),
        )

    def keep_columns(self, used: Collection[str]) -> None:
        """Read no column but these."""
        super().keep_columns(used)
        kept = [name for name in self._dataset.column_names if self._columns.is_kept(name)]
        self._dataset = self._dataset.select_columns(kept)

    @property
    def files(self) -> Sequence[tuple[str, str]]:
        """The table."""
        return [(f"rows of {self._dataset.split or self.name}", self.manifest_hash)]

    def facts(self, rows: NDArray[np.int64]) -> NDArray[np.void]:
        """Length facts per row."""
        facts: NDArray[np.void] = self._facts[np.asarray(rows)]
        return facts

    def origin(self, index: int) -> SampleOrigin:
        """Name a row by its number."""
        return SampleOrigin(self.name, str(self._dataset.split or "rows"), str(index))

    def read(self, index: int) -> RawSample:
        """Read one row; images and videos as bytes.

        Raises:
            SkipSample: if a media file does not exist.
            DataError: if the storage fails or a path is refused.
        """
        self._check(index)
        row = self._plain(self._dataset[index].to_pylist()[0])
        return self._sample(row, self.origin(index))

    def _plain(self, row: dict[str, Any]) -> dict[str, Any]:
        return {column: plain_value(self._dataset.features[column], value) for column, value in row.items()}

    def _load_or_scan(self, name: str, media: MediaColumns, index_dir: Path | None) -> ShardIndex:
        fingerprint = str(self._dataset._fingerprint)
        root = media.root.root
        stamp = f"{_STAMP_VERSION}/{len(self._dataset)}/{root and root.resolve()}/{sorted(media.declared or ())}"
        place = index_dir / "hf" / (fingerprint + INDEX_SUFFIX) if index_dir is not None else None
        index = read_index(place) if place is not None else None
        if index is not None and index.stamp == stamp:
            return index
        spans: list[SampleSpan] = []
        content = hashlib.sha256()
        for batch in self._dataset.iter(batch_size=_ROWS_PER_READ):
            for row in map(self._plain, batch.to_pylist()):
                content.update(_imprint(row, media.typed))
                spans.append(SampleSpan("", {}, media.facts_of(row).row))
        if not spans:
            raise DataError(f"{name}: the data set has no rows")
        media.check_missing(name)
        notes = {
            "media_columns": sorted(media.names),
            "columns": self._dataset.column_names,
            "content": content.hexdigest(),
        }
        index = replace(build_index(spans, 0, notes), stamp=stamp)
        keep_index(index, [place] if place is not None else [])
        return index


def _imprint(row: Mapping[str, Any], typed: Mapping[str, str]) -> bytes:
    """Say what tells a row from another: its values, of bytes their size and both ends, of typed media their names.

    The folder of a file in a column of Image or Video type is left out: moving the data changes nothing.
    """

    def short(value: Any) -> Any:
        if isinstance(value, bytes):
            return [len(value), value[:_END_BYTES].hex(), value[-_END_BYTES:].hex()]
        return str(value)

    plain = {
        column: Path(value).name if column in typed and isinstance(value, str) else value
        for column, value in row.items()
    }
    return json.dumps(plain, sort_keys=True, default=short).encode("utf-8", "surrogatepass")
