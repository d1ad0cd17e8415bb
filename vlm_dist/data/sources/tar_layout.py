"""Where the members of a shard's samples lie, laid out for reading: one row of integers per sample."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.index.facts import member_kind
from vlm_dist.data.index.shard_index import TAR_BLOCK_BYTES, ShardIndex

_ABSENT = -1
_BINARY = frozenset(("image", "video", "binary"))
_FAR = np.iinfo(np.int64).max
_MAX_GAP_BYTES = 64 * 1024  # what is read although nobody wants it: cheaper than another read
_NAME_BYTES = 100
_SIZE_FIELD = slice(124, 136)
FIRST_PLACE = 5  # column of `rows`


class TarLayout:
    """The part of a shard's index that reading needs; a fraction of its memory.

    Args:
        index: of the shard.
        is_kept: whether a member has to be read.

    Attributes:
        members: the kept members: (extension, what follows the key in the member's name).
        parsed: those of them that are not just bytes: (extension, kind).
        rows: [N, 5 + 2 x members] int64: where the key starts and stops in `keys`, where the sample starts and stops
            in the shard (with its headers), whether one read serves all of it, then offset and size of each member in
            bytes, -1 where the sample lacks it.
        keys: all keys, one after the other, as UTF-8.
    """

    __slots__ = ("keys", "members", "parsed", "rows")

    def __init__(self, index: ShardIndex, is_kept: Callable[[str], bool]) -> None:
        names = [name for name in index.offsets if is_kept(name)]
        self.members = [(name, f".{name}".encode()) for name in names]
        self.parsed = [(name, kind) for name in names if (kind := member_kind(name)) not in _BINARY]
        count = len(index)
        self.keys, key_ends = _key_bytes(index)
        offsets = np.empty((count, len(names)), dtype=np.int64)
        sizes = np.empty_like(offsets)
        for i, name in enumerate(names):
            offsets[:, i], sizes[:, i] = index.offsets[name], index.sizes[name]
        has = offsets != _ABSENT
        blocks = np.where(has, -(-sizes // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES + TAR_BLOCK_BYTES, 0).sum(axis=1)
        starts = np.where(has, offsets - TAR_BLOCK_BYTES, _FAR).min(axis=1, initial=_FAR)
        stops = np.where(has, offsets + sizes, 0).max(axis=1, initial=0)
        is_one = stops - starts - blocks <= _MAX_GAP_BYTES
        self.rows = np.empty((count, FIRST_PLACE + 2 * len(names)), dtype=np.int64)
        self.rows[:, 0], self.rows[:, 1] = key_ends[:-1], key_ends[1:]
        self.rows[:, 2], self.rows[:, 3], self.rows[:, 4] = starts, stops, is_one
        self.rows[:, FIRST_PLACE::2], self.rows[:, FIRST_PLACE + 1 :: 2] = offsets, sizes

    def spans(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where samples lie: [len(rows), 2], start and stop in bytes."""
        spans: NDArray[np.int64] = self.rows[rows, 2:4]
        return spans[spans[:, 0] < spans[:, 1]]  # a sample may have no member that is wanted


def _key_bytes(index: ShardIndex) -> tuple[bytes, NDArray[np.int64]]:
    """All keys as one text, and where each ends in it: [N + 1], from 0."""
    if len(index.keys) == 0:
        keys = [str(row).encode() for row in range(len(index))]
        return b"".join(keys), np.cumsum([0, *map(len, keys)], dtype=np.int64)
    _, ends, data = index.keys.buffers()
    start = index.keys.offset
    all_ends = np.frombuffer(ends, dtype=np.int32)[start : start + len(index) + 1].astype(np.int64)
    text = bytes(data) if data is not None else b""
    return text[all_ends[0] : all_ends[-1]], all_ends - all_ends[0]


def is_header_of(data: bytes, position: int, name: bytes, size: int) -> bool:
    """Whether the tar header at a position is that of a member, as far as it tells.

    Args:
        data: part of a shard.
        position: where the header starts in it.
        name: of the member, as the index has it (its extension in lower case).
        size: of its data, in bytes.
    """
    if data.startswith(name + b"\0", position) and data.startswith(b"%011o" % size, position + _SIZE_FIELD.start):
        return True
    header = data[position : position + TAR_BLOCK_BYTES]
    own_name = header[:_NAME_BYTES].rstrip(b"\0")
    try:
        own_size = int(header[_SIZE_FIELD].rstrip(b"\0 ") or b"0", 8)
    except ValueError:  # sizes above 8 GiB are binary
        own_size = size
    # long names stand in an extra header before this one, and prefixes in another field
    same_name = len(own_name) >= _NAME_BYTES or name.lower().endswith(own_name.lower()) or not name.isascii()
    return own_size == size and same_name
