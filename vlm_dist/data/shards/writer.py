"""Writes shards in webdataset's convention, their indexes and their manifest; the same samples give the same bytes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from vlm_dist.data.index.content_check import check_of, checksum_of
from vlm_dist.data.index.facts import SampleFacts, member_kind
from vlm_dist.data.index.manifest import Manifest, ShardEntry, read_manifest
from vlm_dist.data.index.open_index import stamp_of
from vlm_dist.data.index.shard_index import INDEX_SUFFIX, TAR_BLOCK_BYTES, SampleSpan, build_index, write_index
from vlm_dist.data.index.tar_scan import check_extensions, check_members
from vlm_dist.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedSample:
    """A sample as it will stand in a shard: its members' bytes, and what the index says of them."""

    members: Mapping[str, bytes]
    facts: SampleFacts
    json_fields: tuple[str, ...]
    check: int  # see `content_check`
    checksum: int  # CRC-32 of all content


def make_directory(directory: Path) -> None:
    """Make a directory for shards, and those above it.

    Raises:
        DataError: it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{directory}: cannot make the directory: {error.strerror}; choose another one") from error


class ShardWriter:
    """Writes `<prefix>-000000.tar`, `<prefix>-000001.tar`, … with `.index.arrow` sidecars and `manifest.json`.

        with ShardWriter(directory, prefix="train", max_samples=1000) as writer:
            writer.write({"__key__": "000001", "jpg": jpeg_bytes, "json": {"question": "…", "answer": "…"}})

    A shard appears under its name only when it is complete. The manifest describes the whole directory: several
    writers with different prefixes may follow each other in one directory. Shards that are replaced stay until the
    first new one is complete, and then go all at once, so that old and new are never read together.

    Args:
        directory: is made if it is missing.
        prefix: names of the shards start with it.
        max_shard_bytes: a shard is closed when it has reached this size.
        max_samples: a shard is closed when it has this many samples.
        overwrite: replace shards of the same prefix; otherwise they are an error.
        finished: shards of this prefix that an earlier writer has completed; this one goes on behind them, and what
            else there is of the prefix is replaced.

    Raises:
        DataError: if an argument makes no sense, or there are shards of the prefix.
    """

    def __init__(
        self,
        directory: str | Path,
        prefix: str = "shard",
        max_shard_bytes: int = 512 * 1024 * 1024,
        max_samples: int = 10_000,
        overwrite: bool = False,
        finished: Sequence[ShardEntry] = (),
    ) -> None:
        if max_samples < 1 or max_shard_bytes < 1:
            raise DataError(f"max_samples and max_shard_bytes must be positive, got {max_samples}, {max_shard_bytes}")
        if not prefix or "/" in prefix:
            raise DataError(f"shard prefix {prefix!r} must be a file name")
        self.directory = Path(directory)
        self.prefix = prefix
        self.max_shard_bytes = max_shard_bytes
        self.max_samples = max_samples
        self._entries: list[ShardEntry] = list(finished)
        self._open: _OpenShard | None = None
        self._finished = False
        make_directory(self.directory)
        kept = {shard.name for shard in finished}
        present = [path for path in sorted(self.directory.glob(f"{prefix}-[0-9]*.tar")) if path.name not in kept]
        if present and not overwrite and not finished:
            raise DataError(
                f"{self.directory}: there are shards of the prefix {prefix!r} already ({present[0].name}, "
                f"{len(present)} in all); choose another prefix, or overwrite them (--overwrite)"
            )
        self._replaced = present

    def write(self, sample: Mapping[str, Any]) -> ShardEntry | None:
        """Append a sample.

        Args:
            sample: `__key__` and members by extension: bytes as they are, str as UTF-8, dicts and lists as JSON.
                A member of None is left out.

        Returns:
            The shard, if this sample was its last.

        Raises:
            DataError: if the key or a member breaks the convention; the sample is then not written.
        """
        key = sample.get("__key__")
        if not isinstance(key, str) or not key:
            raise DataError(f"a sample needs a '__key__' string, got {key!r}")
        return self.write_prepared(key, prepare_sample(key, sample))

    def write_prepared(self, key: str, sample: PreparedSample) -> ShardEntry | None:
        """Append a sample that `prepare_sample` has made; see `write`."""
        if self._finished:
            raise DataError(f"{self.directory}: the shard writer is closed")
        base = key.rsplit("/", 1)[-1]
        if "." in base or not base or base.startswith("__"):
            raise DataError(f"key {key!r} must be a name without dots that does not start with '__'")
        if self._open is None:
            number = len(self._entries)
            self._open = _OpenShard(self.directory / f"{self.prefix}-{number:06d}.tar")
        self._open.add(key, sample)
        if self._open.num_samples >= self.max_samples or self._open.num_bytes >= self.max_shard_bytes:
            return self._finish_shard()
        return None

    def close(self) -> Manifest:
        """Finish the last shard and write the manifest.

        Returns:
            The manifest of the directory.
        """
        if self._open is not None:
            self._finish_shard()
        self._finished = True
        self._remove_replaced()
        before = read_manifest(self.directory)
        manifest = Manifest(tuple(sorted([*self._others(before), *self._entries], key=lambda shard: shard.name)))
        manifest.write(self.directory)
        return manifest

    def _others(self, manifest: Manifest | None) -> Iterable[ShardEntry]:
        own = f"{self.prefix}-"
        return [shard for shard in manifest.shards if not shard.name.startswith(own)] if manifest else []

    def _remove_replaced(self) -> None:
        if not self._replaced:
            return
        before = read_manifest(self.directory)
        if before is not None:
            Manifest(tuple(self._others(before))).write(self.directory)
        for stale in self._replaced:
            stale.unlink(missing_ok=True)
            stale.with_name(stale.name + INDEX_SUFFIX).unlink(missing_ok=True)
        self._replaced = []

    def _finish_shard(self) -> ShardEntry:
        assert self._open is not None
        shard, self._open = self._open, None
        shard.seal()
        self._remove_replaced()
        entry = shard.publish()
        self._entries.append(entry)
        return entry

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._open is not None:
            self._open.abandon()
            self._open = None
            self._finished = True


class _OpenShard:
    """The shard being written, under a temporary name."""

    def __init__(self, path: Path) -> None:
        from webdataset.writer import TarWriter  # slow to import, and readers do not need it

        self.path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._stream: IO[bytes] = self._temporary.open("wb")
        self._tar = TarWriter(self._stream, encoder=False, mtime=0)
        self._spans: list[SampleSpan] = []
        self._keys: set[str] = set()

    @property
    def num_samples(self) -> int:
        return len(self._spans)

    @property
    def num_bytes(self) -> int:
        return int(self._tar.tarstream.offset)

    def add(self, key: str, sample: PreparedSample) -> None:
        where = f"{self.path}: sample {key!r}"
        if key in self._keys:
            raise DataError(f"{where}: the key was written before; keys must be unique within a shard")
        members = sample.members
        check_extensions(where, members)
        names = dict.fromkeys(members, (0, 0))
        check_members(self.path, [*self._spans[:1], SampleSpan(key, names, sample.facts.values)])
        spans: dict[str, tuple[int, int]] = {}
        for extension in members:
            # one member at a time: the data of the last member ends where the stream stands, whatever its header took
            self._tar.write({"__key__": key, extension: members[extension]})
            size = len(members[extension])
            spans[extension] = (self.num_bytes - -(-size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES, size)
        self._keys.add(key)
        facts, fields = sample.facts.values, sample.json_fields
        self._spans.append(SampleSpan(key, spans, facts, fields, sample.check, sample.checksum))

    def seal(self) -> None:
        """End the archive on the disk, still under its temporary name."""
        self._tar.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def publish(self) -> ShardEntry:
        """Give the sealed archive its name, and write its index."""
        status = self._temporary.stat()
        num_bytes = status.st_size
        index = replace(build_index(self._spans, num_bytes), stamp=stamp_of(status))
        self._temporary.replace(self.path)
        write_index(index, self.path.with_name(self.path.name + INDEX_SUFFIX))
        log.info("wrote %s: %d samples, %d bytes", self.path, len(index), num_bytes)
        return ShardEntry.of(self.path.name, index)

    def abandon(self) -> None:
        self._tar.close()
        self._stream.close()
        self._temporary.unlink(missing_ok=True)


def prepare_sample(name: str, sample: Mapping[str, Any]) -> PreparedSample:
    """Encode a sample's members and read their headers; needs no writer, so that many threads may do it.

    Args:
        name: of the sample, for messages.
        sample: members by extension, as `ShardWriter.write` takes them; names that start with "__" are left out.

    Raises:
        DataError: if a member breaks the convention.
    """
    members: dict[str, bytes] = {}
    for member, value in sample.items():
        if member.startswith("__") or value is None:
            continue
        extension = member.lower()
        if not extension or "/" in extension or extension in members:
            raise DataError(f"sample {name!r}: {member!r} is no usable member extension, or occurs twice")
        members[extension] = _encode_member(name, extension, value)
    if not members:
        raise DataError(f"sample {name!r} has no members")
    facts = SampleFacts()
    fields: tuple[str, ...] = ()
    members = {extension: members[extension] for extension in sorted(members)}
    for extension, data in members.items():
        value = facts.add_member(member_kind(extension), data, len(data))
        if extension == "json" and isinstance(value, dict):
            fields = tuple(value)
    return PreparedSample(members, facts, fields, check_of(members), checksum_of(members))


def _encode_member(key: str, extension: str, value: Any) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if member_kind(extension) == "json":
        try:
            if isinstance(value, str):  # JSON already
                json.loads(value)
                return value.encode()
            return json.dumps(value, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            raise DataError(f"sample {key!r}: member {extension!r} cannot be written as JSON: {error}") from error
    if isinstance(value, str | int | float):
        return str(value).encode()
    raise DataError(f"sample {key!r}: member {extension!r} must be bytes or str, got {type(value).__name__}")
