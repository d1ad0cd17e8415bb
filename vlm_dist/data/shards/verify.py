"""Reads all content of a shard, and finds what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm_dist.data.index.facts import member_kind
from vlm_dist.data.index.manifest import MANIFEST_NAME, read_manifest
from vlm_dist.data.index.open_index import stat_shard
from vlm_dist.data.index.shard_index import ShardIndex, read_index, sidecar_paths
from vlm_dist.data.index.tar_headers import TarReader
from vlm_dist.data.index.tar_scan import scan_tar
from vlm_dist.errors import DataError, SkipSample

_DECODED_FRAMES = 4


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with a shard or one of its samples.

    Attributes:
        problem: "shard" (damaged, or breaks the convention), "index" (not of this shard), "content" (not what was
            written or indexed), "decode", "timeout" or "crash" (of a decoder, by the member in `member`).
    """

    shard: str
    problem: str
    message: str
    key: str | None = None
    member: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return plain values, without what is None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class AtMember:
    """The member that is decoded next: who is asked for, if the decoder ends the process or never returns."""

    row: int
    key: str
    member: str


@dataclass(frozen=True, slots=True)
class ShardRead:
    """A shard was read to its end."""

    num_samples: int
    num_bytes: int
    has_index: bool
    has_checksums: bool


def verify_shard(path: Path, index_dir: Path | None = None, decode: bool = False, start_row: int = 0) -> Iterator[Any]:
    """Verify one shard.

    Args:
        path: the tar.
        index_dir: where its index lies if not beside it.
        decode: also decode every image and some frames of every video.
        start_row: above 0, only decode, from this row: what was found before is known.

    Yields:
        `Finding`, `AtMember` before each member is decoded, `ShardRead` at the end.
    """
    try:
        scanned = scan_tar(path, checksums=start_row == 0)
    except DataError as error:
        yield Finding(str(path), "shard", str(error))
        yield ShardRead(0, 0, has_index=False, has_checksums=False)
        return
    index = _first_index(path, index_dir)
    if start_row == 0 and index is not None:
        yield from _compare(path, index, scanned)
    if decode:
        yield from _decode_all(path, scanned, start_row)
    if start_row == 0 and index is not None:
        listed = _listed_digest(path)
        if listed not in (None, index.digest):
            yield Finding(
                str(path), "index", f"{MANIFEST_NAME} beside it lists another index; was the shard or its index "
                "replaced? Copy the data set again, or if it is meant: vlm-dist shards index --force"
            )  # fmt: skip
    has_checksums = index is not None and index.checksums is not None
    yield ShardRead(len(scanned), scanned.num_bytes, index is not None, has_checksums)


def _first_index(path: Path, index_dir: Path | None) -> ShardIndex | None:
    found = (read_index(place) for place in sidecar_paths(path, index_dir))
    return next((index for index in found if index is not None), None)


def _listed_digest(path: Path) -> str | None:
    """Digest of the shard's index by the manifest of its directory; None where there is none, or a damaged one."""
    try:
        manifest = read_manifest(path.parent)
    except DataError:
        return None
    entries = () if manifest is None else manifest.shards
    return next((entry.index_digest for entry in entries if entry.name == path.name), None)


def _compare(path: Path, index: ShardIndex, scanned: ShardIndex) -> Iterator[Finding]:
    """Compare an index with the shard, sample by sample where they have the same samples."""
    size = stat_shard(path).st_size
    if index.num_bytes != size:
        yield Finding(
            str(path), "index", f"the index is of a shard of {index.num_bytes} bytes, not {size}; index again"
        )
        return
    if index.keys != scanned.keys:
        yield Finding(str(path), "index", "the index lists other samples than the shard has; index again")
        return
    num_different = 0
    for row in range(len(scanned)):
        key = scanned.key(row)
        if index.members_of(row) != scanned.members_of(row):
            num_different += 1
            yield Finding(str(path), "index", "its members lie elsewhere than the index says; index again", key)
        elif _differ(index.checksums, scanned.checksums, row) or _differ(index.checks, scanned.checks, row):
            num_different += 1
            yield Finding(
                str(path), "content", "its content is not what was written or indexed; copy the shard again", key
            )
    if not num_different and index.digest != scanned.digest:
        yield Finding(str(path), "index", "the index has other facts than the shard; index again, with --force")


def _differ(known: Any, found: Any, row: int) -> bool:
    return known is not None and found is not None and int(known[row]) != int(found[row])


def _decode_all(path: Path, index: ShardIndex, start_row: int) -> Iterator[Finding | AtMember]:
    from vlm_dist.data.media.images import decode_image
    from vlm_dist.data.media.video import decode_video

    with TarReader(path) as reader:
        for row in range(start_row, len(index)):
            for member, (offset, size) in index.members_of(row).items():
                kind = member_kind(member)
                if kind not in ("image", "video"):
                    continue
                yield AtMember(row, index.key(row), member)
                data = reader.read(offset, size)
                try:
                    if kind == "image":
                        decode_image(data)
                    else:
                        decode_video(data, num_frames=_DECODED_FRAMES)
                except SkipSample as error:
                    yield Finding(str(path), error.null_class, error.message, index.key(row), member)
