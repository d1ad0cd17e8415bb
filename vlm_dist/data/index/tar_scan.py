"""Indexes tars that have no index, by one pass over their headers, and holds them to the key convention."""

from __future__ import annotations

import logging
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, cast

from vlm_dist.data.index.facts import SampleFacts, member_kind
from vlm_dist.data.index.shard_index import (
    TAR_BLOCK_BYTES,
    SampleSpan,
    ShardIndex,
    build_index,
    keep_index,
    read_index,
    sidecar_paths,
)
from vlm_dist.errors import DataError

#: webdataset's rule: the key ends at the first dot of the base name.
_MEMBER_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")

log = logging.getLogger(__name__)


def load_or_scan(shard: Path, index_dir: Path | None = None) -> ShardIndex:
    """Read a shard's index; where there is none (or it is of another size of the shard), scan the tar and write one.

    Raises:
        DataError: if the tar is missing, truncated, damaged or breaks the key convention.
    """
    try:
        num_bytes = shard.stat().st_size
    except OSError as error:
        raise DataError(f"{shard}: cannot open the shard: {error.strerror}") from error
    places = sidecar_paths(shard, index_dir)
    for place in places:
        index = read_index(place)
        if index is not None and index.num_bytes == num_bytes:
            return index
        if index is not None:
            log.warning("%s is of another version of the shard (%d bytes, now %d): indexing again",
                        place, index.num_bytes, num_bytes)  # fmt: skip
    index = scan_tar(shard)
    keep_index(index, places)
    return index


def scan_tar(path: Path) -> ShardIndex:
    """Index an existing tar by one pass over its headers (and the headers of its images and videos).

    Raises:
        DataError: if the tar is compressed, truncated or damaged, or breaks the key convention.
    """
    samples: list[SampleSpan] = []
    seen: set[str] = set()
    num_skipped = 0
    num_bytes = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            end = 0
            current: _OpenSample | None = None
            for member in archive:
                end = member.offset_data + (
                    -(-member.size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES if member.isreg() else 0
                )
                if member.offset_data + member.size > num_bytes:
                    raise DataError(f"{path}: truncated inside {member.name!r}; copy or write the shard again")
                match = _MEMBER_NAME.match(member.name)
                if member.isdir():
                    continue
                if match is None or not member.isreg() or member.issparse():
                    num_skipped += 1
                    continue
                key, extension = match.group(1), match.group(2).lower()
                if current is None or key != current.key:
                    if current is not None:
                        samples.append(current.close(path))
                    if key in seen:
                        raise DataError(
                            f"{path}: key {key!r} occurs twice; the members of a sample must follow each other "
                            "and keys must be unique within a shard"
                        )
                    seen.add(key)
                    current = _OpenSample(key)
                stream = cast("IO[bytes]", archive.extractfile(member))
                current.add(path, extension, member.offset_data, member.size, stream)
            if current is not None:
                samples.append(current.close(path))
        _check_end(path, end)
    except tarfile.ReadError as error:
        raise DataError(
            f"{path}: the tar is truncated, damaged or compressed ({error}); copy it again, or decompress it"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot read the shard: {error}") from error
    if num_skipped:
        log.warning("%s: %d members are no samples (no extension, or links) and are left out", path, num_skipped)
    if not samples:
        raise DataError(f"{path}: the shard has no samples (members named <key>.<extension>)")
    check_members(path, samples)
    return build_index(samples, num_bytes)


class _OpenSample:
    """A sample whose members are still being read."""

    def __init__(self, key: str) -> None:
        self.key = key
        self._members: dict[str, tuple[int, int]] = {}
        self._facts = SampleFacts()
        self._json_fields: tuple[str, ...] = ()

    def add(self, path: Path, extension: str, offset: int, size: int, stream: IO[bytes]) -> None:
        if extension in self._members:
            raise DataError(f"{path}: sample {self.key!r} has two {extension!r} members")
        self._members[extension] = (offset, size)
        value = self._facts.add_member(member_kind(extension), cast("Any", stream), size)
        if extension == "json" and isinstance(value, dict):
            self._json_fields = tuple(value)

    def close(self, path: Path) -> SampleSpan:
        check_extensions(f"{path}: sample {self.key!r}", self._members)
        return SampleSpan(self.key, self._members, self._facts.row, self._json_fields)


def check_extensions(where: str, extensions: Iterable[str]) -> None:
    """Refuse extensions that come from a dot inside the key: such samples merge into one.

    `left.jpg`, `right.jpg` and `json` of one key are three members. `5x.jpg`, `5x.json`, `7x.jpg`, `7x.json` are the
    samples `img_1.5x` and `img_1.7x`, which the key convention takes for one.
    """
    by_prefix: dict[str, set[str]] = {}
    for extension in extensions:
        prefix, _, last = extension.rpartition(".")
        if prefix:
            by_prefix.setdefault(prefix, set()).add(last)
    merged = [prefix for prefix, lasts in by_prefix.items() if len(lasts) > 1]
    odd = [prefix for prefix in by_prefix if not re.match(r"^[a-z_][\w.-]*$", prefix)]
    if odd or merged:
        raise DataError(
            f"{where}: a key must not contain a dot (found the extensions {sorted(extensions)}); "
            "the key ends at the first dot of the member's name. Rename the members, e.g. img_1.5x.jpg to img_1_5x.jpg"
        )


def check_members(path: Path, samples: Iterable[SampleSpan]) -> None:
    """Refuse a sample that lacks a text or JSON member of its neighbours; one without media is a text sample."""
    rows = list(samples)
    every = {name for row in rows for name in row.members if member_kind(name) in ("json", "text")}
    for row in rows:
        missing = sorted(every - set(row.members))
        if missing:
            raise DataError(
                f"{path}: sample {row.key!r} has no {', '.join(missing)} member, but others do "
                f"(it has {', '.join(sorted(row.members))}); complete the sample or leave it out"
            )


def _check_end(path: Path, end: int) -> None:
    """Require the zero block that ends an archive: tarfile takes damage and a clean cut for the end."""
    with path.open("rb") as stream:
        stream.seek(end)
        block = stream.read(TAR_BLOCK_BYTES)
    if len(block) < TAR_BLOCK_BYTES:
        raise DataError(f"{path}: truncated after {end} bytes (no end-of-archive block); copy or write the shard again")
    if any(block):
        raise DataError(f"{path}: damaged header at byte {end}; copy or write the shard again")
