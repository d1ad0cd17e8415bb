"""Tells by a few bytes of every sample whether a shard still holds what was indexed.

The layout of a shard (keys, offsets, sizes) does not change when a picture is replaced by another of the same size.
So an index also has a check per sample: the CRC-32 of each member's first and last bytes, in archive order; of JSON and
of small members the whole. Compressed pictures and videos that differ, differ in their last bytes (a PNG even ends
with a checksum), and the last bytes of a member lie beside the next header, so a scan gets them for free. What differs
in the middle alone, as bit rot does, is found by the checksum of the whole content, where an index has one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from vlm_dist.data.index.facts import member_kind

_WHOLE_BYTES = 4096  # members up to this size are covered whole
_END_BYTES = 512


def checked_ranges(extension: str, size: int) -> tuple[tuple[int, int], ...]:
    """List the parts of a member that its check covers, as (start, size) in bytes."""
    if size <= _WHOLE_BYTES or member_kind(extension) == "json":
        return ((0, size),)
    return ((0, _END_BYTES), (size - _END_BYTES, _END_BYTES))


def check_of(members: Mapping[str, bytes]) -> int:
    """Compute the check of a sample in memory: extension -> data, in archive order."""
    check = 0
    for extension, data in members.items():
        for start, size in checked_ranges(extension, len(data)):
            check = zlib.crc32(memoryview(data)[start : start + size], check)
    return check


def checksum_of(members: Mapping[str, bytes]) -> int:
    """Compute the CRC-32 of all content of a sample: extension -> data, in archive order."""
    checksum = 0
    for data in members.values():
        checksum = zlib.crc32(data, checksum)
    return checksum
