"""Media folders, records and builds for the tests of `vlm-dist shards build`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_dist.config.data import DataSource
from vlm_dist.data.index.manifest import read_manifest
from vlm_dist.data.shards.build import BuildSettings, BuildSummary, build_shards
from vlm_dist.data.sources import open_source
from vlm_dist.data.types import Source


def picture(level: int = 0, image_format: str = "JPEG", size: tuple[int, int] = (32, 16)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (level % 256, 7, 9)).save(stream, image_format)
    return stream.getvalue()


def write_pictures(folder: Path, count: int, suffix: str = ".jpg") -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number}{suffix}" for number in range(count)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(picture(number))
    return names


def write_lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in records), encoding="utf-8")
    return path


def build(path: Path, out: Path, **settings: Any) -> BuildSummary:
    settings.setdefault("type", "jsonl")
    return build_shards(BuildSettings(out=out, path=str(path), **settings))


def opened(out: Path) -> Source:
    return open_source(DataSource(type="tar", path=str(out)))


def rows(out: Path) -> list[dict[str, Any]]:
    source = opened(out)
    return [dict(source.read(number).fields) for number in range(len(source))]


def keys(out: Path) -> list[str]:
    source = opened(out)
    return [source.origin(number).key for number in range(len(source))]


def contents(out: Path) -> dict[str, Any]:
    """What was written, but for the times at which it was: tars, the report, the hash of all indexes."""
    manifest = read_manifest(out)
    files = {path.name: path.read_bytes() for path in sorted(out.glob("*")) if path.suffix in (".tar", ".jsonl")}
    return {**files, "hash": manifest and manifest.hash}
