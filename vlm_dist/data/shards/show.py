"""Finds one sample in some shards, and shows or extracts its members."""

from __future__ import annotations

import difflib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlm_dist.data.index.facts import member_kind, probe_image, probe_video
from vlm_dist.data.index.open_index import load_or_scan
from vlm_dist.data.index.tar_headers import TarReader
from vlm_dist.errors import DataError

log = logging.getLogger(__name__)

_MAX_TEXT = 4000
_MAX_KEYS_COMPARED = 200_000
_RASTER_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO")


@dataclass(frozen=True, slots=True)
class FoundSample:
    """Where a sample lies."""

    shard: Path
    key: str
    row: int
    num_samples: int  # of the shard
    members: dict[str, tuple[int, int]]  # extension -> (offset, size) in bytes, in archive order


def find_sample(paths: Sequence[Path], key: str, index_dir: Path | None = None) -> FoundSample:
    """Find a sample by its key; shards without an index are indexed.

    Args:
        paths: the shards.
        key: as it stands in the index, or as errors print it: `<shard>.tar:<key>`, with or without the source's name.
        index_dir: where indexes lie that are not beside their tar.

    Raises:
        DataError: if there is no such sample, with the keys that are most like it.
    """
    shard_name, _, own_key = key.rpartition(".tar:")
    if shard_name:
        name = shard_name.rpartition("/")[2] + ".tar"
        paths = [path for path in paths if path.name == name]
        if not paths:
            raise DataError(f"{key!r}: there is no shard {name} among these")
    known: list[str] = []
    damaged: list[str] = []
    for path in paths:
        try:
            index = load_or_scan(path, index_dir)
        except DataError as error:  # the sample may be in another one
            damaged.append(str(error))
            continue
        keys = index.keys.to_pylist()
        if own_key in keys:
            row = keys.index(own_key)
            for problem in damaged:
                log.warning("not looked into: %s", problem)
            members = dict(sorted(index.members_of(row).items(), key=lambda item: item[1]))
            return FoundSample(path, own_key, row, len(index), members)
        known.extend(keys[: max(0, _MAX_KEYS_COMPARED - len(known))])
    near = list(dict.fromkeys([*_same_base(own_key, known), *difflib.get_close_matches(own_key, known, 5, 0.5)]))[:5]
    hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
    example = f"; keys look like {known[0]!r}" if known and not near else ""
    shards = "1 shard" if len(paths) == 1 else f"{len(paths)} shards"
    if damaged:
        unread = "".join(f"\n  {problem}" for problem in damaged)
        raise DataError(f"{own_key!r} was not found; {len(damaged)} of {shards} cannot be looked into:{unread}")
    raise DataError(f"no sample has the key {own_key!r} in {shards}{hint}{example}")


def describe_sample(sample: FoundSample) -> Iterator[str]:
    """Write what a sample holds, line by line; what shards hold is made safe for a terminal."""
    yield f"{sample.shard}  sample {sample.row + 1} of {sample.num_samples}  key {_printable(sample.key)}"
    with TarReader(sample.shard) as reader:
        for extension, (offset, size) in sample.members.items():
            kind = member_kind(extension)
            told = _header(reader, kind, offset, size)
            yield f"\n{_printable(extension)}  {kind}, {size:,} bytes at {offset:,}{told}"
            if kind in ("json", "text", "unknown"):
                yield _text(reader.read(offset, min(size, _MAX_TEXT * 4)), size, kind)


def extract_sample(sample: FoundSample, directory: Path) -> list[Path]:
    """Write the members of a sample as files of their own; no name leads out of the directory.

    Raises:
        DataError: if a file exists already, or cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise DataError(f"--extract {directory}: is a file, not a directory") from error
    except OSError as error:
        raise DataError(f"--extract {directory}: cannot be made: {error.strerror}") from error
    written: list[Path] = []
    with TarReader(sample.shard) as reader:
        for extension, (offset, size) in sample.members.items():
            name = re.sub(r"[^\w.-]", "_", f"{sample.key}.{extension}").lstrip(".")
            path = directory / name
            try:
                with path.open("xb") as target:
                    target.write(reader.read(offset, size))
            except FileExistsError as error:
                raise DataError(f"{path}: exists already; nothing is overwritten") from error
            except OSError as error:
                raise DataError(f"{path}: cannot be written: {error.strerror}") from error
            written.append(path)
    return written


def _header(reader: TarReader, kind: str, offset: int, size: int) -> str:
    """Say what the header of an image or a video tells."""
    if kind == "image":
        stream = io.BytesIO(reader.read(offset, size))
        upright = probe_image(stream)
        if upright is None:
            return ", the header cannot be read"
        stream.seek(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(stream, formats=_RASTER_FORMATS) as image:
                    turned = "" if image.size == upright else " upright"
                    return f", {upright[0]} x {upright[1]} pixels{turned}, {image.mode}, {image.format}"
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return f", {upright[0]} x {upright[1]} pixels, a format that is not decoded"
    if kind == "video":
        video = probe_video(reader.stream(offset, size))
        if video is None:
            return ", the header cannot be read"
        return f", {video[0]} frames, {video[1]:.2f} s, {video[2]} x {video[3]} pixels"
    return ""


def _text(data: bytes, size: int, kind: str) -> str:
    try:
        text = data.decode("utf-8") if len(data) == size else data.decode("utf-8", "ignore")
    except UnicodeDecodeError as error:
        return f"  not UTF-8: {error}"
    if kind == "json" and len(data) == size:
        try:
            text = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
        except (ValueError, RecursionError) as error:
            text = f"not JSON ({error}): {text}"
    left = len(text) - _MAX_TEXT if len(data) == size else size - len(text.encode())
    lines = _printable(text[:_MAX_TEXT]).splitlines()
    return "\n".join(f"  {line}" for line in [*lines, *([f"… ({left:,} more)"] if left > 0 else [])])


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def _same_base(key: str, known: Sequence[str]) -> list[str]:
    base = key.rpartition("/")[2]
    return [other for other in known if other.rpartition("/")[2] == base][:5]
