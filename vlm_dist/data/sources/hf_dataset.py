"""Hugging Face datasets from the hub, a `save_to_disk` directory or local files; their values as they are stored."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from vlm_dist.config.masking import masked
from vlm_dist.data.sources.columns import SourceSettings, setting
from vlm_dist.errors import DataError

#: Builders of `datasets` by the ending of a local file.
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json"}
_FOLDER_BUILDERS = ("imagefolder", "videofolder")
_LOCAL_PATH = re.compile(r"^[./~]")
_FILE_ENDINGS = (*_BUILDERS, ".ndjson", ".tar", ".txt", ".gz", ".zip")


def load_rows(name: str, settings: SourceSettings, streaming: bool = False) -> Any:
    """Load the data set that the settings mean, and choose its split.

    Returns:
        A `datasets.Dataset`; with `streaming` a `datasets.IterableDataset`, except for what `save_to_disk` wrote.

    Raises:
        DataError: if it cannot be loaded, or has no such split.
    """
    path, split = setting(settings, "path"), setting(settings, "split")
    check_local(name, settings)
    try:
        if path is not None and _is_saved(Path(path)):
            return _choose_split(name, datasets.load_from_disk(path), split)
        builder, files = _builder_and_files(name, settings)
        loaded = datasets.load_dataset(builder, data_files=files, split=split, streaming=streaming)
        return _choose_split(name, loaded, split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name}: cannot load the data set {path or setting(settings, 'name')!r}: {masked(str(error))}. Check its "
            "name and, for a gated one, your login; on a machine without network give a local directory as path"
        ) from error


def check_local(name: str, settings: SourceSettings) -> None:
    """Refuse a path of this machine that is not there: the hub, which would be asked for it, can only mislead.

    Raises:
        DataError: naming the path.
    """
    path, files = setting(settings, "path"), setting(settings, "data_files")
    if path is not None and not Path(path).exists() and _is_local(path):
        if Path(path).expanduser().exists():
            raise DataError(f"{name}: write {path} without ~, as {Path(path).expanduser()}")
        hint = "; patterns of files stand in data_files" if glob.has_magic(path) else ""
        parent = Path(path).parent
        folder = "" if parent.is_dir() else f"; its folder {parent} does not exist either"
        raise DataError(f"{name}: there is no {path} (looked from {Path.cwd()}){folder}{hint}")
    if files is None or path is not None or _is_of_hub(setting(settings, "name")):
        return
    groups = list(files.values()) if isinstance(files, Mapping) else [files]
    named = [str(file) for group in groups for file in ([group] if isinstance(group, str | Path) else group)]
    missing = [file for file in named if "://" not in file and not (Path(file).exists() or _matches(file))]
    if missing:
        more = f" and {len(missing) - 1} more of its data_files" if len(missing) > 1 else ""
        raise DataError(f"{name}: there is no {missing[0]}{more} (looked from {Path.cwd()})")


def _matches(pattern: str) -> bool:
    return next(glob.iglob(pattern, recursive=True), None) is not None  # noqa: PTH207 - absolute patterns too


def _is_local(path: str) -> bool:
    """Whether a path can hardly be meant for a data set of the hub (`squad`, `acme/cats`)."""
    if "://" in path:
        return False
    if _LOCAL_PATH.match(path) or path.count("/") > 1 or path.lower().endswith(_FILE_ENDINGS):
        return True
    parent = Path(path).parent
    return parent != Path() and parent.is_dir()


def _builder_and_files(name: str, settings: SourceSettings) -> tuple[str, Any]:
    """Return the first argument of `load_dataset` and its `data_files`."""
    path, files = setting(settings, "path"), setting(settings, "data_files")
    if path is not None and Path(path).is_file():
        return _builder_of(name, path), path
    target = path or setting(settings, "name")
    if files is None or (path is not None and Path(path).exists()):
        return str(target), files
    if _is_of_hub(target):
        return str(target), files
    return _builder_of(name, files), files  # the name is only a label


def _is_of_hub(target: Any) -> bool:
    """Whether a name is that of a data set, or of a builder, and not only a label."""
    return target is not None and ("/" in target or target in _BUILDERS.values() or target in _FOLDER_BUILDERS)


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


def media_feature_kind(feature: Any) -> str | None:
    """Return "image" or "video" for a media type or a list of one."""
    if isinstance(feature, datasets.Image):
        return "image"
    if isinstance(feature, datasets.Video):
        return "video"
    element = _element(feature)
    return media_feature_kind(element) if element is not None else None


def _element(feature: Any) -> Any:
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", None)


def plain_value(feature: Any, value: Any) -> Any:
    """Turn a stored value into a plain one: media into bytes or a path, Json into what it encodes."""
    if value is None:
        return None
    if isinstance(feature, datasets.Image | datasets.Video):
        if not isinstance(value, Mapping):
            return value
        data = value.get("bytes")
        return data if data is not None else value.get("path")  # empty bytes are a damaged picture, not none
    if type(feature).__name__ == "Json":  # newer than the oldest datasets that we support
        return json.loads(value) if isinstance(value, str) else value
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {key: plain_value(feature.get(key), item) for key, item in value.items()}
    element = _element(feature)
    if element is not None and isinstance(value, list):
        return [plain_value(element, item) for item in value]
    return value


def own_folders(settings: SourceSettings) -> list[Path]:
    """List the local folders that the settings name: what a builder finds there it may point to."""
    files = setting(settings, "data_files", [])
    groups = list(files.values()) if isinstance(files, Mapping) else [files]
    named = [file for group in groups for file in ([group] if isinstance(group, str) else group)]
    named.append(setting(settings, "path", ""))
    folders = []
    for name in filter(None, named):
        fixed = re.split(r"[*?\[{]", name)[0]
        place = Path(fixed) if fixed == name or fixed.endswith("/") else Path(fixed).parent
        if "://" not in name and place.exists():
            folders.append(place if place.is_dir() else place.parent)
    return folders


def cache_folders(dataset: datasets.Dataset) -> list[Path]:
    """List the folders that `datasets` keeps a data set in, and what it has downloaded and unpacked for it."""
    tables = [Path(str(file["filename"])).parent for file in dataset.cache_files]
    return [*tables, Path(datasets.config.HF_DATASETS_CACHE), Path(datasets.config.DOWNLOADED_DATASETS_PATH)]
