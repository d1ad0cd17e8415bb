"""Sources: data sets with random access by row."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_dist.data.sources.columns import SourceSettings
from vlm_dist.data.types import Source
from vlm_dist.errors import DataError

if TYPE_CHECKING:
    from vlm_dist.data.sources.arrow import ArrowSource
    from vlm_dist.data.sources.jsonl import JsonSource
    from vlm_dist.data.sources.tar import TarSource

__all__ = ["SourceSettings", "open_source"]


def open_source(
    settings: SourceSettings,
    index_dir: str | Path | None = None,
    media_columns: Collection[str] | None = None,
    used_columns: Collection[str] | None = None,
) -> Source:
    """Open one entry of `data.train` or `data.eval`; what has no index yet is indexed.

    Args:
        settings: with the attributes `name`, `type`, `path`, `split`, `data_files`, `media_root`, `columns`,
            `max_samples`; all but `type` optional.
        index_dir: where indexes go that cannot lie beside the data.
        media_columns: columns that hold paths of images or videos (after `columns` has renamed them); None finds them
            by the endings of the values. Tar members need no such hint.
        used_columns: the only columns (after renaming) that are read; None: all.

    Raises:
        DataError: if there is no such data, it is damaged, or the settings do not fit it.
    """
    folder = Path(index_dir) if index_dir is not None else None
    media = frozenset(media_columns) if media_columns is not None else None
    source: TarSource | ArrowSource | JsonSource
    if settings.type == "tar":
        from vlm_dist.data.sources.tar import TarSource

        source = TarSource.open(settings, folder)
    elif settings.type == "hf":
        from vlm_dist.data.sources.arrow import ArrowSource  # imports datasets

        source = ArrowSource.open(settings, folder, media)
    elif settings.type == "jsonl":
        from vlm_dist.data.sources.jsonl import JsonSource

        source = JsonSource.open(settings, folder, media)
    else:
        raise DataError(f"unknown source type {settings.type!r}; expected tar, hf or jsonl")
    if used_columns is not None:
        source.keep_columns(used_columns)
    return source
