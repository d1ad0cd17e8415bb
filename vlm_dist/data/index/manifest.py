"""A data set's manifest: which shards it has, and a hash that changes when any of them does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from vlm_dist.data.index.shard_index import INDEX_FORMAT, ShardIndex, replacing
from vlm_dist.errors import DataError

MANIFEST_NAME = "manifest.json"
#: Behind the prefix of its shards, the name of the file in which a build notes how far it is.
BUILD_NOTE_SUFFIX = "-build.json"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard, as its manifest knows it."""

    name: str
    num_samples: int
    num_bytes: int
    index_digest: str
    members: tuple[str, ...] = ()  # tar members by extension; empty for rows
    json_fields: tuple[str, ...] = ()
    single_media: tuple[str, ...] = ()  # kinds of which no sample has more than one plain member
    stamp: str = ""  # of the file that was indexed; not part of the hash

    @classmethod
    def of(cls, name: str, index: ShardIndex) -> ShardEntry:
        """Describe a shard by its index."""
        return cls(
            name,
            len(index),
            index.num_bytes,
            index.digest,
            tuple(index.offsets),
            index.json_fields,
            index.single_media,
            index.stamp,
        )

    @classmethod
    def of_metadata(cls, name: str, metadata: Mapping[str, str]) -> ShardEntry:
        """Describe a shard by what its index says of itself (see `read_metadata`)."""
        return cls(
            name,
            int(metadata["num_samples"]),
            int(metadata["num_bytes"]),
            metadata["digest"],
            tuple(json.loads(metadata["members"])),
            tuple(json.loads(metadata["json_fields"])),
            tuple(json.loads(metadata["single_media"])),
            metadata["stamp"],
        )


_SHAPE = ShardEntry("", 0, 0, "")  # of what type each field is


@dataclass(frozen=True, slots=True)
class Manifest:
    """The shards of a data set, in order."""

    shards: tuple[ShardEntry, ...]

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def hash(self) -> str:
        """Hex digest over name, size and index digest of every shard."""
        rows = [[shard.name, shard.num_bytes, shard.index_digest] for shard in self.shards]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]

    def write(self, directory: Path) -> None:
        """Write `manifest.json` atomically."""
        document = {
            "version": _VERSION,
            "index_format": INDEX_FORMAT,
            "num_samples": self.num_samples,
            "num_bytes": sum(shard.num_bytes for shard in self.shards),
            "hash": self.hash,
            "shards": [asdict(shard) for shard in self.shards],
        }
        with replacing(directory / MANIFEST_NAME) as stream:
            stream.write((json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def read_manifest(directory: Path) -> Manifest | None:
    """Read a directory's `manifest.json`.

    Returns:
        None where there is none. An entry whose stamp is empty is not to be trusted without a look at its index.

    Raises:
        DataError: if the file cannot be understood.
    """
    path = directory / MANIFEST_NAME
    try:
        document = json.loads(path.read_bytes())
        if document["version"] != _VERSION:
            raise DataError(f"{path}: manifest version {document['version']} is unknown, expected {_VERSION}")
        shards = tuple(_entry(row) for row in document["shards"])
        if document.get("hash") not in (None, Manifest(shards).hash):
            raise ValueError("its shards are not those of its hash")
        if document.get("index_format") != INDEX_FORMAT:  # digests of another version are not those of today's indexes
            shards = tuple(replace(shard, stamp="") for shard in shards)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: the manifest cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: damaged manifest ({error!r}); delete it and it is made from the indexes") from error
    return Manifest(shards)


def _entry(row: dict[str, object]) -> ShardEntry:
    sequences = {
        name: tuple(value) for name, value in row.items() if isinstance(value, Sequence) and not isinstance(value, str)
    }
    entry = ShardEntry(**{**row, **sequences})  # type: ignore[arg-type]
    for field in fields(ShardEntry):
        value = getattr(entry, field.name)
        parts = value if isinstance(value, tuple) else ()
        if type(value) is not type(getattr(_SHAPE, field.name)) or not all(isinstance(part, str) for part in parts):
            raise TypeError(f"{field.name}: {value!r}")
    return entry


def unfinished_builds(directory: Path) -> list[str]:
    """List the prefixes of shards whose build was stopped and has not gone on."""
    prefixes = []
    for note in sorted(directory.glob(f"*{BUILD_NOTE_SUFFIX}")):
        try:
            if json.loads(note.read_bytes()).get("is_complete") is False:
                prefixes.append(note.name.removesuffix(BUILD_NOTE_SUFFIX))
        except (OSError, ValueError, AttributeError):  # a file of somebody else's
            continue
    return prefixes
