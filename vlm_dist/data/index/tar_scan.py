"""Indexes tars that have no index, by one pass over their headers, and holds them to the key convention."""

from __future__ import annotations

import itertools
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from vlm_dist.data.index.content_check import checked_ranges
from vlm_dist.data.index.facts import SampleFacts, member_kind, probe_image
from vlm_dist.data.index.image_header import HEAD_BYTES, plain_image_size
from vlm_dist.data.index.shard_index import SampleSpan, ShardIndex, build_index
from vlm_dist.data.index.tar_headers import TarMember, TarReader
from vlm_dist.errors import DataError

#: webdataset's rule: the key ends at the first dot of the base name.
_MEMBER_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")

_CHUNK_BYTES = 1024 * 1024
_PROBED_SAMPLES = 100

log = logging.getLogger(__name__)


def scan_tar(path: Path, checksums: bool = False) -> ShardIndex:
    """Index an existing tar by one pass over its headers, its JSON, and the headers of its images and videos.

    Args:
        path: of the tar.
        checksums: read all content, and keep a checksum of every sample.

    Raises:
        DataError: if the tar is compressed, truncated or damaged, or breaks the key convention.
    """
    samples: list[SampleSpan] = []
    skipped: list[str] = []
    try:
        with TarReader(path) as reader:
            samples.extend(_samples(reader, checksums, skipped))
            num_bytes = reader.num_bytes
    except OSError as error:
        raise DataError(f"{path}: cannot read the shard: {error}") from error
    if skipped:
        log.warning(
            "%s: %d members are no samples (no extension, or links) and are left out, first %r",
            path,
            len(skipped),
            skipped[0],
        )
    if not samples:
        raise DataError(f"{path}: the shard has no samples (members named <key>.<extension>)")
    check_members(path, samples)
    return build_index(samples, num_bytes)


def probe_scan(path: Path, checksums: bool = False) -> int:
    """Scan the start of a tar, to see how long that takes.

    Returns:
        The bytes that were covered; of a damaged tar, all that it has.
    """
    try:
        with TarReader(path) as reader:
            end = 0
            for sample in itertools.islice(_samples(reader, checksums, []), _PROBED_SAMPLES):
                end = max(offset + size for offset, size in sample.members.values())
            return end or reader.num_bytes
    except (OSError, DataError):
        return path.stat().st_size


def _samples(reader: TarReader, checksums: bool, skipped: list[str]) -> Iterator[SampleSpan]:
    """Put the members of a tar together to samples; `skipped` collects the names of the others."""
    seen: set[str] = set()
    current: _OpenSample | None = None
    for member in reader.members():
        if member.is_directory:
            continue
        match = _MEMBER_NAME.match(member.name)
        if match is None or not member.is_regular:
            skipped.append(member.name)
            continue
        key, extension = match.group(1), match.group(2).lower()
        if current is None or key != current.key:
            if current is not None:
                yield current.close()
            _check_key(reader.path, key, seen)
            seen.add(key)
            current = _OpenSample(reader, key, checksums)
        current.add(extension, member)
    if current is not None:
        yield current.close()


def _check_key(path: Path, key: str, seen: set[str]) -> None:
    if key in seen:
        raise DataError(
            f"{path}: key {key!r} occurs twice; the members of a sample must follow each other "
            "and keys must be unique within a shard"
        )
    if not key.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in key):
        raise DataError(f"{path}: the member name {key!r} is not UTF-8; rename it")


class _OpenSample:
    """A sample whose members are still being read."""

    def __init__(self, reader: TarReader, key: str, checksums: bool) -> None:
        self.key = key
        self._reader = reader
        self._members: dict[str, tuple[int, int]] = {}
        self._facts = SampleFacts()
        self._json_fields: tuple[str, ...] = ()
        self._check = 0
        self._checksum = 0 if checksums else None

    def add(self, extension: str, member: TarMember) -> None:
        if extension in self._members:
            raise DataError(f"{self._reader.path}: sample {self.key!r} has two {extension!r} members")
        offset, size = member.offset, member.size
        self._members[extension] = (offset, size)
        kind = member_kind(extension)
        if kind == "image":
            self._facts.add_image_size(self._image_size(offset, size))
        elif kind == "json":
            value = self._facts.add_member(kind, self._reader.read(offset, size), size)
            if extension == "json" and isinstance(value, dict):
                self._json_fields = tuple(value)
        elif kind == "video":
            self._facts.add_video(self._reader.stream(offset, size))
        else:
            self._facts.add_member(kind, b"", size)
        if self._checksum is not None:
            self._checksum = checksum_of_range(self._reader, offset, size, self._checksum)
        for start, length in checked_ranges(extension, size):
            self._check = zlib.crc32(self._reader.read(offset + start, length), self._check)

    def _image_size(self, offset: int, size: int) -> tuple[int, int] | None:
        head = self._reader.read(offset, min(size, HEAD_BYTES))
        return plain_image_size(head, size) or probe_image(self._reader.stream(offset, size))

    def close(self) -> SampleSpan:
        check_extensions(f"{self._reader.path}: sample {self.key!r}", self._members)
        return SampleSpan(self.key, self._members, self._facts.values, self._json_fields, self._check, self._checksum)


def checksum_of_range(reader: TarReader, offset: int, size: int, checksum: int = 0) -> int:
    """Continue a CRC-32 over a range of a file.

    Raises:
        DataError: if the file ends before.
    """
    end = offset + size
    while offset < end:
        data = reader.read(offset, min(_CHUNK_BYTES, end - offset))
        if not data:
            raise DataError(f"{reader.path}: truncated at byte {offset}; copy or write the shard again")
        checksum = zlib.crc32(data, checksum)
        offset += len(data)
    return checksum


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
