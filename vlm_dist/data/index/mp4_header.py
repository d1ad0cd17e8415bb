"""Reads the length of an mp4 or mov video from its boxes: no decoder, so nothing in the file can crash or hang us."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_MAX_HEADER_BYTES = 64 * 1024 * 1024
_QUARTER_TURN = 0x10000  # 1.0 in the fixed point of a track's matrix


class VideoHeader(NamedTuple):
    """What a video's header says."""

    num_frames: int
    seconds: float
    width: int  # in pixels, as shown
    height: int


def read_mp4_header(stream: BinaryIO) -> VideoHeader | None:
    """Read the header of the first video track.

    Returns:
        None where the file is no mp4, is cut, or keeps its frames in fragments.
    """
    try:
        movie = find_movie(stream)
        if movie is None:
            return None
        for kind, track in boxes_in(movie):
            if kind == b"trak":
                header = _read_track(track)
                if header is not None:
                    return header
    except (struct.error, ValueError, KeyError, IndexError):
        return None
    return None


def find_movie(stream: BinaryIO) -> bytes | None:
    """Return the body of the `moov` box, skipping over the pictures; checks that no box leads out of the file."""
    end = stream.seek(0, 2)
    position, movie = 0, None
    while position + 8 <= end:
        stream.seek(position)
        size, kind = struct.unpack(">I4s", stream.read(8))
        header_size = 8
        if size == 1:
            (size,) = struct.unpack(">Q", stream.read(8))
            header_size = 16
        elif size == 0:
            size = end - position
        if size < header_size or position + size > end or (position == 0 and not kind.isalnum()):
            return None
        if kind == b"moov":
            if size > _MAX_HEADER_BYTES:
                return None
            movie = stream.read(size - header_size)
        position += size
    return movie


def _read_track(track: bytes) -> VideoHeader | None:
    boxes = dict(boxes_in(track))
    media = dict(boxes_in(boxes[b"mdia"]))
    if media[b"hdlr"][8:12] != b"vide":
        return None
    table = dict(boxes_in(dict(boxes_in(media[b"minf"]))[b"stbl"]))
    sizes = table[b"stsz"] if b"stsz" in table else table[b"stz2"]
    (num_frames,) = struct.unpack_from(">I", sizes, 8)
    long_times = media[b"mdhd"][0] == 1
    ticks_per_second, ticks = struct.unpack_from(
        ">IQ" if long_times else ">II", media[b"mdhd"], 20 if long_times else 12
    )
    head = boxes[b"tkhd"]
    matrix = struct.unpack_from(">9i", head, 52 if head[0] == 1 else 40)
    width, height = (value >> 16 for value in struct.unpack_from(">II", head, 88 if head[0] == 1 else 76))
    if abs(matrix[1]) == _QUARTER_TURN:
        width, height = height, width
    if num_frames == 0 or width == 0 or height == 0:
        return None
    return VideoHeader(num_frames, ticks / ticks_per_second if ticks_per_second else 0.0, width, height)


def boxes_in(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (kind, body) of the boxes in a box."""
    position = 0
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        if size < 8 or position + size > len(data):
            raise ValueError(f"box {kind!r} of {size} bytes leads out of its parent")
        yield kind, data[position + 8 : position + size]
        position += size
