"""Opens the index of a tar shard, and sees that it still is the index of what the tar holds.

An index of the same size and modification time as its shard is trusted. Where the time differs (the shard was copied,
touched or replaced) the first and last bytes of its members are compared with the index's checks: what agrees keeps its
index under the new time. What does not agree is indexed again, gets another digest, and is refused by a run that
resumes; but where the index has checksums of all content, as `ShardWriter` makes them, it is the shard that is wrong.
"""

from __future__ import annotations

import logging
import os
import shlex
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlm_dist.data.index.content_check import checked_ranges
from vlm_dist.data.index.manifest import ShardEntry
from vlm_dist.data.index.shard_index import (
    ShardIndex,
    keep_index,
    read_index,
    read_metadata,
    sidecar_paths,
)
from vlm_dist.data.index.tar_headers import TarReader
from vlm_dist.data.index.tar_scan import scan_tar
from vlm_dist.errors import DataError, printable

#: Samples of one shard that are compared when its time has changed; `vlm-dist shards verify` compares all.
MAX_COMPARED = 10_000

log = logging.getLogger(__name__)


def load_or_scan(shard: Path, index_dir: Path | None = None, expected: str | None = None) -> ShardIndex:
    """Read a shard's index; where there is none that fits the shard, scan the tar and write one.

    Args:
        shard: the tar.
        index_dir: where its index may lie if not beside it.
        expected: digest of the index that the plan was made from; that index is trusted without another look.

    Raises:
        DataError: if the tar is missing, truncated, damaged or breaks the key convention, or is not the one expected.
    """
    status = stat_shard(shard)
    index = _trusted(shard, status, index_dir, expected)
    if index is None:
        index = recheck(shard, index_dir, MAX_COMPARED)
    if index is None:
        index = index_tar(shard, index_dir)
    if expected is not None and index.digest != expected:
        raise DataError(f"{shard}: the shard or its index has changed since this run began; start the run again")
    return index


def index_tar(shard: Path, index_dir: Path | None = None, checksums: bool = False) -> ShardIndex:
    """Scan a tar and keep its index.

    Raises:
        DataError: as `scan_tar`, or if the tar changes meanwhile.
    """
    status = stat_shard(shard)
    index = replace(scan_tar(shard, checksums), stamp=stamp_of(status))
    after = stat_shard(shard)
    if (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
        raise DataError(f"{shard}: the file changed while it was indexed; is it still being written?")
    keep_index(index, sidecar_paths(shard, index_dir))
    return index


def known_entry(shard: Path, status: os.stat_result, index_dir: Path | None) -> ShardEntry | None:
    """Describe a shard by the trusted index that it has, without reading the rows; None where it has none."""
    for place in sidecar_paths(shard, index_dir):
        metadata = read_metadata(place)
        if metadata is not None and (metadata["num_bytes"], metadata["stamp"]) == (
            str(status.st_size),
            stamp_of(status),
        ):
            return ShardEntry.of_metadata(shard.name, metadata)
    return None


def recheck(shard: Path, index_dir: Path | None, max_compared: int) -> ShardIndex | None:
    """Look for an index made from the same content at another time, and keep it under the shard's present time.

    Returns:
        The index; None where there is none, or the shard has other content.

    Raises:
        DataError: the index has checksums of all content, and the shard is not what was written.
    """
    status = stat_shard(shard)
    places = sidecar_paths(shard, index_dir)
    for place in places:
        index = read_index(place)
        if index is None:
            continue
        if index.num_bytes != status.st_size:
            log.warning("%s is of another version of the shard (%d bytes, now %d): indexing again",
                        place, index.num_bytes, status.st_size)  # fmt: skip
        elif index.checks is None:
            continue
        elif (row := next(_differing_rows(shard, index, max_compared), None)) is not None:
            if index.checksums is not None:
                raise DataError(
                    f"{shard}: the content of sample {printable(index.key(row))} is not what was written: copy the "
                    f"shard again (vlm-dist shards verify {shlex.quote(str(shard))} lists all such samples); or if it "
                    f"was changed on purpose: vlm-dist shards index --force {shlex.quote(str(shard))}"
                )
            log.warning("%s: the shard's content is not what was indexed (%s): indexing again", shard, place)
        else:
            index = replace(index, stamp=stamp_of(status))
            keep_index(index, places)
            return index
    return None


def differing_keys(shard: Path, index: ShardIndex) -> list[str]:
    """List the samples whose first and last bytes are not those that were indexed."""
    return [index.key(row) for row in _differing_rows(shard, index, len(index))]


def stamp_of(status: os.stat_result) -> str:
    """Say what an index was made from; beside the size, which it has anyway."""
    return str(status.st_mtime_ns)


def stat_shard(shard: Path) -> os.stat_result:
    """Get size and time of a shard.

    Raises:
        DataError: if it cannot be opened.
    """
    try:
        return shard.stat()
    except OSError as error:
        raise DataError(f"{shard}: cannot open the shard: {error.strerror}") from error


def _trusted(shard: Path, status: os.stat_result, index_dir: Path | None, expected: str | None) -> ShardIndex | None:
    for place in sidecar_paths(shard, index_dir):
        index = read_index(place)
        if index is None or index.num_bytes != status.st_size:
            continue
        if index.stamp == stamp_of(status) or (expected is not None and index.digest == expected):
            return index
    return None


def _differing_rows(shard: Path, index: ShardIndex, max_compared: int) -> Iterator[int]:
    """Yield the rows that differ; of many samples an even spread is compared, the first and the last included."""
    assert index.checks is not None
    count = min(len(index), max(max_compared, 2))
    rows = np.unique(np.linspace(0, len(index) - 1, count).round().astype(np.int64)).tolist()
    try:
        with TarReader(shard) as reader:
            for row in rows:
                check = 0
                for extension, (offset, size) in sorted(index.members_of(row).items(), key=lambda item: item[1]):
                    for start, length in checked_ranges(extension, size):
                        check = zlib.crc32(reader.read(offset + start, length), check)
                if check != int(index.checks[row]):
                    yield row
    except OSError as error:
        raise DataError(f"{shard}: cannot read the shard: {error}") from error
