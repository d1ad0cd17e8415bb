"""Reads samples and makes thumbnails of their media, in a process that may die of it (`pictures` has the other end).

One JSON document comes on the standard input; a line of JSON per wanted sample goes out.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import resource
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image, ImageFile, ImageOps

from vlm_dist.data.media.containers import HEAD_BYTES, container_of
from vlm_dist.data.media.limits import IMAGE_FORMATS, MAX_IMAGE_PIXELS
from vlm_dist.data.sources import open_source
from vlm_dist.data.sources.columns import source_name
from vlm_dist.data.types import Source
from vlm_dist.errors import SkipSample, VlmDistError

_SIDE = 176  # pixels
_NUM_FRAMES = 4
_MAX_PICTURES = 4  # of a sample
_MAX_ROWS = 200_000  # that are looked through for one
_MEMORY_BYTES = 8 * 2**30
_CPU_SECONDS = 120


class Sources:
    """The data of a run, opened when a sample of it is wanted.

    Args:
        data: the section of the resolved configuration.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data
        self._opened: dict[tuple[str, int], Source | str] = {}

    def read(self, purpose: str, name: str, shard: str, key: str) -> Mapping[str, Any] | str:
        """The undecoded columns of a sample; or why they cannot be read."""
        problem = "its source is not in resolved_config.yaml"
        for number, settings in enumerate(self._data.get(purpose) or ()):
            if not isinstance(settings, dict) or _name(settings) not in (name, name.rpartition("#")[0]):
                continue
            source = self._open(purpose, number, settings)
            if isinstance(source, str):
                problem = source
                continue
            row = find_row(source, shard, key)
            if row is None:
                problem = "it is no longer there"
                continue
            return source.read(row).fields
        return problem

    def _open(self, purpose: str, number: int, settings: Mapping[str, Any]) -> Source | str:
        place = (purpose, number)
        if place not in self._opened:
            self._opened[place] = self._opened_now(settings)
        return self._opened[place]

    def _opened_now(self, settings: Mapping[str, Any]) -> Source | str:
        paths = settings.get("path")
        shown = [str(one) for one in (paths if isinstance(paths, list) else [paths]) if one is not None]
        if not shown or any("://" in one or one.startswith("pipe:") for one in shown):
            return "its data is not on this machine"
        try:
            return open_source(_namespace(settings), self._data.get("index_dir"))
        except VlmDistError as error:
            return f"its source cannot be opened: {str(error).splitlines()[0]}"


def find_row(source: Source, shard: str, key: str) -> int | None:
    """The row of a sample, by what errors call it."""

    def is_it(row: int) -> bool:
        origin = source.origin(row)
        return origin.key == key and origin.shard == shard

    if key.isdecimal() and len(key) < 16 and int(key) < len(source) and is_it(int(key)):
        return int(key)
    first = 0
    names = [name for name, _ in source.files]
    for name, count in zip(names, source.shard_sizes, strict=False):
        if name == shard:
            rows = range(first, first + min(count, _MAX_ROWS))
            return next((row for row in rows if is_it(row)), None)
        first += count
    return next((row for row in range(min(len(source), _MAX_ROWS)) if is_it(row)), None) if shard not in names else None


def pictures_of(fields: Mapping[str, Any]) -> tuple[list[bytes], str]:
    """JPEGs of a sample's images and videos, and what is wrong with them."""
    pictures: list[bytes] = []
    notes: list[str] = []
    media = [one for value in fields.values() for one in (value if isinstance(value, list) else [value])]
    for medium in media:
        if not isinstance(medium, bytes) or len(pictures) >= _MAX_PICTURES:
            continue
        try:
            found, note = thumbnails(medium)
            pictures += found
            notes += [note] if note else []
        except SkipSample as skip:
            notes.append(skip.message)
    if not media or (not pictures and not notes):
        notes.append("it has no picture")
    return pictures[:_MAX_PICTURES], "; ".join(notes)


def thumbnails(data: bytes) -> tuple[list[bytes], str]:
    """Of an image one, of a video a few; and what is wrong with them.

    Raises:
        SkipSample: nothing of it can be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Exception:  # noqa: BLE001 - Pillow raises many types on damaged bytes; it may be a video
        if container_of(data[:HEAD_BYTES]) is None:
            raise SkipSample("decode", "nothing of it can be decoded") from None
        return _frames(data), ""
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise SkipSample("decode", f"it has {image.width} x {image.height} pixels")
    image.draft("RGB", (2 * _SIDE, 2 * _SIDE))
    try:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        image.load()
    except Exception as error:  # noqa: BLE001 - Pillow raises many types; half a picture tells more than none
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            part = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            return [_jpeg(part)], "only a part can be decoded"
        except Exception:  # noqa: BLE001
            raise SkipSample("decode", "nothing of it can be decoded") from error
    return [_jpeg(image)], ""


def _frames(data: bytes) -> list[bytes]:
    from vlm_dist.data.media.video import decode_video  # imports torch

    return [_jpeg(Image.fromarray(frame)) for frame in decode_video(data, num_frames=_NUM_FRAMES).frames]


def _jpeg(image: Image.Image) -> bytes:
    upright = ImageOps.exif_transpose(image)
    flat = upright.convert("RGB") if upright.mode != "RGBA" else Image.alpha_composite(
        Image.new("RGBA", upright.size, (255, 255, 255, 255)), upright
    ).convert("RGB")  # fmt: skip
    flat.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    flat.save(stream, "JPEG", quality=80)
    return stream.getvalue()


def _answers(task: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    sources = Sources(task["data"])
    for wanted in task["wanted"]:
        try:
            fields = sources.read(wanted["purpose"], wanted["source"], wanted["shard"], wanted["key"])
            pictures, note = ([], fields) if isinstance(fields, str) else pictures_of(fields)
        except SkipSample as skip:
            pictures, note = [], skip.message
        except Exception as error:  # noqa: BLE001 - of damaged media; the others are wanted all the same
            pictures, note = [], f"{type(error).__name__}: {error}"
        yield {"pictures": [base64.b64encode(one).decode() for one in pictures], "note": note}


def _name(settings: Mapping[str, Any]) -> str:
    paths = settings.get("path")
    first = paths[0] if isinstance(paths, list) and paths else paths
    return source_name(_namespace(settings), str(first or ""))


def _namespace(settings: Mapping[str, Any]) -> Any:
    subset = settings.get("subset")
    values = {**settings, "subset": SimpleNamespace(**subset) if isinstance(subset, dict) else None}
    return SimpleNamespace(**values)


def main() -> None:
    """Answer one task."""
    task = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever decoders print
    logging.disable(logging.CRITICAL)
    for which, limit in ((resource.RLIMIT_AS, _MEMORY_BYTES), (resource.RLIMIT_CPU, _CPU_SECONDS)):
        hard = resource.getrlimit(which)[1]
        resource.setrlimit(which, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if task["directory"] and Path(task["directory"]).is_dir():
        os.chdir(task["directory"])  # which the paths of the configuration start from
    for answer in _answers(task):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
