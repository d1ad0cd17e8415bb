"""Sources: data sets with random access by row."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_dist.config.conditions import parse_conditions
from vlm_dist.data.sources.columns import SourceSettings, setting, source_name
from vlm_dist.data.sources.filtered import FilteredSource
from vlm_dist.data.storage.find import find_files
from vlm_dist.data.types import Source
from vlm_dist.errors import DataError

if TYPE_CHECKING:
    from vlm_dist.data.sources.arrow import ArrowSource
    from vlm_dist.data.sources.jsonl import JsonSource
    from vlm_dist.data.sources.tar import TarSource
    from vlm_dist.data.storage.shard_storage import CacheSettings

__all__ = ["SourceSettings", "missing_data", "open_source"]


def missing_data(settings: SourceSettings) -> str | None:
    """Say what is not there of a source's local data, by a look for its files alone; None: nothing, or it is remote.

    Args:
        settings: as for `open_source`.
    """
    paths = setting(settings, "path", [])
    patterns = [str(paths)] if isinstance(paths, str | Path) else [str(path) for path in paths]
    name = source_name(settings, patterns[0] if patterns else "")
    try:
        if settings.type == "hf":
            from vlm_dist.data.sources.hf_dataset import check_local

            check_local(name, settings)
            return None
        endings = (".tar",) if settings.type == "tar" else (".jsonl", ".ndjson", ".json")
        for pattern in patterns:
            if "://" not in pattern and not pattern.startswith("pipe:"):
                find_files(name, pattern, endings)
    except DataError as error:
        return str(error)
    return None


def open_source(
    settings: SourceSettings,
    index_dir: str | Path | None = None,
    media_columns: Collection[str] | None = None,
    used_columns: Collection[str] | None = None,
    cache: CacheSettings | None = None,
) -> Source:
    """Open one entry of `data.train` or `data.eval`; what has no index yet is indexed.

    Args:
        settings: with the attributes `name`, `type`, `path`, `split`, `data_files`, `media_root`, `columns`,
            `max_samples`, `where`, `subset`; all but `type` optional.
        index_dir: where indexes go that cannot lie beside the data.
        media_columns: columns that hold paths of images or videos (after `columns` has renamed them); None finds them
            by the endings of the values. Tar members need no such hint.
        used_columns: the only columns (after renaming) that are read; None: all.
        cache: how shards that are not in local files are kept on this machine.

    Raises:
        DataError: if there is no such data, it is damaged, or the settings do not fit it.
    """
    folder = Path(index_dir) if index_dir is not None else None
    media = frozenset(media_columns) if media_columns is not None else None
    source: TarSource | ArrowSource | JsonSource | FilteredSource
    if settings.type == "tar":
        from vlm_dist.data.sources.tar import TarSource

        source = TarSource.open(settings, folder, cache)
        source.declare_columns(media or ())
    elif settings.type == "hf":
        from vlm_dist.data.sources.arrow import ArrowSource  # imports datasets

        source = ArrowSource.open(settings, folder, media)
    elif settings.type == "jsonl":
        from vlm_dist.data.sources.jsonl import JsonSource

        source = JsonSource.open(settings, folder, media)
    else:
        raise DataError(f"unknown source type {settings.type!r}; expected tar, hf or jsonl")
    conditions, subset = parse_conditions(setting(settings, "where", {})), setting(settings, "subset")
    if conditions or subset is not None:  # before columns are left out: conditions may need them
        share, seed = (1.0, 0) if subset is None else (subset.share, subset.seed)
        source = FilteredSource(source, conditions, share, seed, folder)
    if used_columns is not None:
        source.keep_columns(used_columns)
    return source
