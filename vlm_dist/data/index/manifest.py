"""A data set's manifest: which shards it has, and a hash that changes when any of them does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vlm_dist.data.index.shard_index import ShardIndex, replacing
from vlm_dist.errors import DataError

MANIFEST_NAME = "manifest.json"
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

    @classmethod
    def of(cls, name: str, index: ShardIndex) -> ShardEntry:
        """Describe a shard by its index."""
        return cls(name, len(index), index.num_bytes, index.digest, tuple(index.offsets), index.json_fields)


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
        None where there is none.

    Raises:
        DataError: if the file cannot be understood.
    """
    path = directory / MANIFEST_NAME
    try:
        document = json.loads(path.read_bytes())
        if document["version"] != _VERSION:
            raise DataError(f"{path}: manifest version {document['version']} is unknown, expected {_VERSION}")
        shards = tuple(_entry(row) for row in document["shards"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged manifest ({error!r}); delete it and it is made from the indexes") from error
    return Manifest(shards)


def _entry(row: dict[str, object]) -> ShardEntry:
    sequences = {
        name: tuple(value) for name, value in row.items() if isinstance(value, Sequence) and not isinstance(value, str)
    }
    return ShardEntry(**{**row, **sequences})  # type: ignore[arg-type]
