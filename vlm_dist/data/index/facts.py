"""Length facts: what the planner knows of a sample without decoding it.

Facts come from headers (image size, number of video frames) and from the size of the text. They are predictions:
the planner uses them to put samples of similar length together, the materialiser is the judge of the real length.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm_dist.data.index.image_header import HEAD_BYTES, plain_image_size
from vlm_dist.data.index.mp4_header import read_mp4_header
from vlm_dist.errors import DataError, SkipSample

#: One row per sample. 0 means "none of that kind" or "unknown"; `num_images` and `num_videos` tell which.
FACTS_DTYPE = np.dtype(
    [
        ("text_bytes", "<i8"),
        ("num_images", "<i4"),
        ("image_width", "<i4"),  # of the largest image, after EXIF rotation
        ("image_height", "<i4"),
        ("image_pixels", "<i8"),  # sum over all images
        ("num_videos", "<i4"),
        ("video_frames", "<i8"),  # of the longest video
        ("video_seconds", "<f4"),
        ("video_width", "<i4"),
        ("video_height", "<i4"),
    ]
)

_KINDS = {
    "image": "jpg jpeg jpe png webp bmp gif tif tiff ppm pgm pbm jp2 avif",
    "video": "mp4 m4v mov avi mkv webm mpg mpeg ts flv wmv ogv 3gp",
    "text": "txt text cls cls2 index inx id transcript caption question answer",
    "binary": "npy npz pyd pkl pickle pth pt ten tb mp wav mp3 flac ogg m4a bin zip gz cbor pdf",
    "json": "json",
}
_KIND_OF = {extension: kind for kind, extensions in _KINDS.items() for extension in extensions.split()}

_EXIF_ORIENTATION = 0x0112
_EXIF_TRANSPOSED = (5, 6, 7, 8)


def member_kind(extension: str) -> str:
    """Say what a tar member or a file holds, by the last part of its extension.

    Returns:
        "image", "video", "json", "text", "binary" or "unknown".
    """
    return _KIND_OF.get(extension.rsplit(".", 1)[-1].lower(), "unknown")


def media_kind(path: str) -> str | None:
    """Return "image" or "video" when a path or URL ends like one, else None."""
    name = path.rsplit("/", 1)[-1].split("?", 1)[0]
    if "." not in name:
        return None
    kind = member_kind(name.rsplit(".", 1)[-1])
    return kind if kind in ("image", "video") else None


class SampleFacts:
    """Collects the facts of one sample, member by member."""

    def __init__(self) -> None:
        self._text_bytes = 0
        self._images = (0, 0, 0, 0)  # number, width and height of the largest, pixels of all
        self._num_videos = 0
        self._video: tuple[float, ...] = (0, 0.0, 0, 0)  # frames, seconds, width, height

    @property
    def values(self) -> tuple[float, ...]:
        """The facts in the order of `FACTS_DTYPE`."""
        return (self._text_bytes, *self._images, self._num_videos, *self._video)

    @property
    def row(self) -> NDArray[np.void]:
        """The facts as a scalar of `FACTS_DTYPE`."""
        return np.array(self.values, dtype=FACTS_DTYPE)

    def add_text(self, num_bytes: int) -> None:
        """Count text by its UTF-8 size."""
        self._text_bytes += num_bytes

    def add_image(self, source: BinaryIO | bytes | Path) -> None:
        """Read an image's header; one that cannot be read counts with unknown size."""
        self.add_image_size(probe_image(source))

    def add_image_size(self, size: tuple[int, int] | None) -> None:
        """Count an image of a known or unknown (width, height)."""
        number, width, height, pixels = self._images
        if size is not None:
            pixels += size[0] * size[1]
            if size[0] * size[1] > width * height:
                width, height = size
        self._images = (number + 1, width, height, pixels)

    def add_video(self, source: BinaryIO | bytes | Path) -> None:
        """Read a video's header; one that cannot be read counts with unknown length."""
        self._num_videos += 1
        try:
            probed = probe_video(source)
        except OSError:
            return
        if probed is not None and probed[0] > self._video[0]:
            self._video = tuple(probed)

    def add_member(self, kind: str, source: BinaryIO | bytes, num_bytes: int) -> Any:
        """Add one tar member.

        Returns:
            The parsed value of a JSON member, None for all others and for damaged JSON.
        """
        if kind == "image":
            self.add_image(source)
        elif kind == "video":
            self.add_video(source)
        elif kind == "json":
            try:
                value = json.loads(source if isinstance(source, bytes) else source.read())
                size = text_bytes(value)
            except (ValueError, RecursionError):  # the sample becomes a null slot when it is read
                self.add_text(num_bytes)
                return None
            self.add_text(size)
            return value
        elif kind in ("text", "unknown"):
            self.add_text(num_bytes)
        return None


def text_bytes(value: Any) -> int:
    """UTF-8 size of all strings in a JSON-like value."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, Mapping):
        return sum(text_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(text_bytes(item) for item in value)
    if value is None or isinstance(value, bytes):
        return 0
    return len(str(value))


def probe_image(source: BinaryIO | bytes | Path) -> tuple[int, int] | None:
    """Read (width, height) after EXIF rotation from an image's header.

    Returns:
        None where Pillow cannot read the header.
    """
    if isinstance(source, bytes):
        size = plain_image_size(source[:HEAD_BYTES], len(source))
        if size is not None:
            return size
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a very large or odd image is the decoder's business
            with Image.open(stream) as image:
                # PngImageFile.getexif decodes the whole picture when there is no eXIf chunk before the pixels
                exif = Image.Image.getexif(image) if image.format == "PNG" else image.getexif()
                # Pillow gives the size of a TIFF as it is after rotation
                turned = exif.get(_EXIF_ORIENTATION) in _EXIF_TRANSPOSED and image.format != "TIFF"
                width, height = image.size
    except Exception:  # noqa: BLE001 - Pillow raises anything at an odd header; the decoder will say what is wrong
        return None
    return (height, width) if turned else (width, height)


def probe_video(source: BinaryIO | bytes | Path) -> tuple[int, float, int, int] | None:
    """Read (frames, seconds, width, height) from a video's header.

    mp4 and mov are read by code of our own; other containers by PyAV, which raises on damaged files, or, where it is
    not installed, by decord.

    Returns:
        None where the header cannot be read.
    """
    with _as_stream(source) as stream:
        header = read_mp4_header(stream)
        if header is not None:
            return header
        stream.seek(0)
        return _probe_with_library(source if isinstance(source, Path) else stream)


def _probe_with_library(source: BinaryIO | Path) -> tuple[int, float, int, int] | None:
    from vlm_dist.data.media.video import open_reader  # heavy, and rarely needed

    library = "pyav" if importlib.util.find_spec("av") is not None else "decord"
    with _as_path(source) as path:
        try:
            reader = open_reader(path, (library,))
        except (SkipSample, DataError):
            return None
        try:
            seconds = reader.num_frames / reader.fps if reader.fps > 0 else 0.0
            return reader.num_frames, seconds, *reader.size
        finally:
            reader.close()


@contextmanager
def _as_stream(source: BinaryIO | bytes | Path) -> Iterator[BinaryIO]:
    if isinstance(source, Path):
        with source.open("rb") as stream:
            yield stream
    else:
        yield io.BytesIO(source) if isinstance(source, bytes) else source


@contextmanager
def _as_path(source: BinaryIO | Path) -> Iterator[str]:
    """Give decord a path: a truncated mp4 read through a Python object kills the process, through a file it raises."""
    if isinstance(source, Path):
        yield str(source)
        return
    descriptor = os.memfd_create("vlm-dist-probe")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as target:
            shutil.copyfileobj(source, target)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
