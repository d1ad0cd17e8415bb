"""Laws of the sources."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_dist.config.data import DataConfig, DataSource
from vlm_dist.config.laws.finding import Finding
from vlm_dist.config.masking import MASK
from vlm_dist.config.yaml_document import KeyPath


def check_sources(data: DataConfig) -> Iterator[Finding]:
    """Every source says what it is, and nothing that does not belong to its kind."""
    if not data.train:
        yield Finding(("data", "train"), "got no source, expected at least one: - {type: tar, path: …}")
    for name, sources in (("train", data.train), ("eval", data.eval)):
        for index, source in enumerate(sources):
            yield from _source(source, ("data", name, index))
    for index, source in enumerate(data.eval):
        if source.repeat != 1:
            message = f"got {source.repeat:g}, expected 1: each held-out sample is evaluated once; remove it"
            yield Finding(("data", "eval", index, "repeat"), message)
        if source.weight is not None:
            message = f"got {source.weight:g}, expected none: each held-out sample is evaluated once; remove it"
            yield Finding(("data", "eval", index, "weight"), message)
    if data.cache.stage_files and data.cache.mode == "range":
        message = "got true beside mode: range, which copies nothing; expected mode: auto or whole"
        yield Finding(("data", "cache", "stage_files"), message, also=(("data", "cache", "mode"),))
    yield from _weights(data)


def _weights(data: DataConfig) -> Iterator[Finding]:
    weighted = [index for index, source in enumerate(data.train) if source.weight is not None]
    for index, source in enumerate(data.train if weighted else ()):
        path: KeyPath = ("data", "train", index)
        if source.weight is None:
            others = ", ".join(f"data.train[{number}]" for number in weighted)
            yield Finding((*path, "weight"), f"is missing: {others} has one; give all sources a weight, or none")
        elif "repeat" in source.model_fields_set:
            message = f"does not apply beside weight {source.weight:g}; remove one of them"
            yield Finding((*path, "repeat"), message, also=((*path, "weight"),))


def _source(source: DataSource, path: KeyPath) -> Iterator[Finding]:
    paths = [source.path] if isinstance(source.path, str) else source.path or []
    if any(MASK in one and ("://" in one or one.startswith("pipe:")) for one in paths):
        message = f"has {MASK} in the place of a secret, which no run writes down; give the whole path again"
        yield Finding((*path, "path"), message)
    kinds = {"a URL" if "://" in one and not one.startswith("pipe:") else "a local path or pipe" for one in paths}
    if len(kinds) > 1:
        yield Finding((*path, "path"), "got URLs and local paths in one list; make them two sources")
    elif kinds == {"a URL"} and source.type != "tar":
        message = f"got a URL, expected a local path: over the network only tar shards are read, not {source.type}"
        yield Finding((*path, "path"), message, also=((*path, "type"),))
    if not isinstance(source.path, str | None) and source.type == "hf":
        yield Finding((*path, "path"), "got a list, expected one directory; data_files may be a list")
    if source.type == "hf":
        if source.path is None and source.name is None:
            yield Finding(path, "a source of type hf needs a name (of a dataset) or a path (written by save_to_disk)")
        if source.path is not None and source.data_files is not None:
            message = "does not apply beside path; it selects files of the dataset that name names"
            yield Finding((*path, "data_files"), message, also=((*path, "path"),))
        return
    if source.path is None:
        yield Finding(path, f"a source of type {source.type} needs a path")
    for key in ("split", "data_files", "media_root"):
        if getattr(source, key) is not None and not (key == "media_root" and source.type == "jsonl"):
            message = f"does not apply to a source of type {source.type}; remove it"
            yield Finding((*path, key), message, also=((*path, "type"),))
