"""Tells video containers apart by their first bytes, and what in an mp4 makes seeking difficult.

Nothing else is handed to a video library: FFmpeg also opens playlists, which name further files and servers to read.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.index.mp4_header import boxes_in, find_movie

#: Bytes that `container_of` needs.
HEAD_BYTES = 400

_TRANSPORT_PACKETS = ((0, 188), (4, 192))  # position of the first sync byte, size of a packet
_SYNC_BYTE = 0x47

_STARTS = {
    b"\x1aE\xdf\xa3": "matroska",  # mkv and webm
    b"FLV\x01": "flv",
    b"OggS": "ogg",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "asf",  # wmv
    b"\0\0\1\xba": "mpeg",
    b"\0\0\1\xb3": "mpeg",
    b"GIF8": "gif",
}


def container_of(head: bytes) -> str | None:
    """Name the container that a video is in.

    Args:
        head: its first `HEAD_BYTES` bytes.

    Returns:
        "mp4" (also mov), "matroska", "avi", "flv", "ogg", "asf", "mpeg", "mpegts", "gif", or None: no video.
    """
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return "mp4"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    for start, name in _STARTS.items():
        if head.startswith(start):
            return name
    for first, size in _TRANSPORT_PACKETS:
        if len(head) > first + size and head[first] == head[first + size] == _SYNC_BYTE:
            return "mpegts"
    return None


def has_leading_frames(stream: BinaryIO) -> bool | None:
    """Say whether an mp4 has frames that are shown before a key frame and stored behind it (open groups of pictures).

    Who begins to read at such a key frame never gets them.

    Returns:
        None where the file's tables cannot be read.
    """
    try:
        movie = find_movie(stream)
        for kind, track in boxes_in(movie or b""):
            if kind == b"trak":
                media = dict(boxes_in(dict(boxes_in(track))[b"mdia"]))
                if media[b"hdlr"][8:12] == b"vide":
                    return _leads(dict(boxes_in(dict(boxes_in(media[b"minf"]))[b"stbl"])))
    except (struct.error, ValueError, KeyError, IndexError):
        return None
    return None


def _leads(table: dict[bytes, bytes]) -> bool:
    if b"stss" not in table or b"ctts" not in table:
        return False  # every frame is a key frame, or all are shown in the order in which they are stored
    shown = np.cumsum(_expanded(table[b"stts"])[:-1], dtype=np.int64)
    offsets = _expanded(table[b"ctts"])
    shown = np.concatenate([[0], shown])[: len(offsets)] + offsets[: len(shown) + 1]
    keys = np.frombuffer(table[b"stss"], ">u4", offset=8).astype(np.int64) - 1
    keys = keys[keys < len(shown)]
    if len(keys) == 0:
        return False
    earliest_from_here = np.minimum.accumulate(shown[::-1])[::-1]
    return bool((earliest_from_here[keys] < shown[keys]).any())


def _expanded(box: bytes) -> NDArray[np.int64]:
    """The values of a run-length coded table."""
    (num_runs,) = struct.unpack_from(">I", box, 4)
    runs = np.frombuffer(box, ">i4", count=2 * num_runs, offset=8).reshape(-1, 2)
    if int(runs[:, 0].sum(dtype=np.int64)) > 100_000_000 or (runs[:, 0] < 0).any():
        raise ValueError("the table of times has too many entries")
    return np.repeat(runs[:, 1], runs[:, 0]).astype(np.int64)
