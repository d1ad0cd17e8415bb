"""Sums up a set of shards from their indexes: how much there is, which columns, how long the samples are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.index.facts import FACTS_DTYPE, member_kind
from vlm_dist.data.index.members import media_columns, one_per_sample
from vlm_dist.data.index.open_index import stamp_of, stat_shard
from vlm_dist.data.index.shard_index import TAR_BLOCK_BYTES, ShardIndex, read_index, sidecar_paths
from vlm_dist.data.index.tar_headers import TarReader
from vlm_dist.errors import DataError

_MAX_LISTED = 20


@dataclass(frozen=True, slots=True)
class Column:
    """A column that samples may have.

    Attributes:
        kind: image, video, text, json, binary or unknown; "field" for a key of the JSON members.
        filled: share of the samples that have it; None where that is not known.
    """

    name: str
    kind: str
    filled: float | None


@dataclass(frozen=True, slots=True)
class Spread:
    """How a length is spread over the samples that have it."""

    name: str
    num_samples: int
    min: float
    median: float
    p95: float
    max: float


@dataclass(frozen=True, slots=True)
class ShardSetInfo:
    """What the indexes of some shards say; shards without an index count with their bytes alone."""

    num_shards: int
    num_indexed: int
    num_stale: int  # shards whose time is not that of their index
    num_with_checksums: int
    num_samples: int
    num_bytes: int
    columns: tuple[Column, ...]
    lengths: tuple[Spread, ...]
    not_indexed: tuple[str, ...]
    damaged: tuple[str, ...] = ()  # what is wrong with shards without an index, as far as a look at both ends tells

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def sum_up(paths: Sequence[Path], index_dir: Path | None = None) -> ShardSetInfo:
    """Read the indexes of some shards; nothing is indexed.

    Raises:
        DataError: if a shard cannot be opened.
    """
    damaged: list[str] = []
    filled: Counter[str] = Counter()
    fields: dict[str, None] = {}
    facts: list[NDArray[np.void]] = []
    shapes: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    not_indexed: list[str] = []
    num_bytes = num_stale = num_with_checksums = 0
    for path in paths:
        status = stat_shard(path)
        num_bytes += status.st_size
        index = _index_of(path, status.st_size, index_dir)
        if index is None:
            problem = _problem_of(path)
            if problem is None:
                not_indexed.append(str(path))
            else:
                damaged.append(problem)
            continue
        num_stale += index.stamp != stamp_of(status)
        num_with_checksums += index.checksums is not None
        for member, offsets in index.offsets.items():
            filled[member] += int(np.count_nonzero(offsets >= 0))
        fields |= dict.fromkeys(index.json_fields)
        facts.append(index.facts)
        shapes.append((tuple(index.offsets), index.single_media))
    all_facts = np.concatenate(facts) if facts else np.zeros(0, dtype=FACTS_DTYPE)
    num_samples = len(all_facts)
    columns = [Column(name, member_kind(name), filled[name] / num_samples) for name in sorted(filled)]
    for name, members in media_columns(shapes, [*filled, *fields]).items():
        share = min(1.0, sum(filled[member] for member in one_per_sample(members)) / num_samples)
        columns.append(Column(name, f"{name}: {' or '.join(members)}", share))
    columns += [Column(name, "field", None) for name in sorted(fields)]
    return ShardSetInfo(
        num_shards=len(paths),
        num_indexed=len(facts),
        num_stale=num_stale,
        num_with_checksums=num_with_checksums,
        num_samples=num_samples,
        num_bytes=num_bytes,
        columns=tuple(columns),
        lengths=tuple(_spreads(all_facts)),
        not_indexed=tuple(not_indexed),
        damaged=tuple(damaged),
    )


def _index_of(path: Path, num_bytes: int, index_dir: Path | None) -> ShardIndex | None:
    for place in sidecar_paths(path, index_dir):
        index = read_index(place)
        if index is not None and index.num_bytes == num_bytes:
            return index
    return None


def _problem_of(path: Path) -> str | None:
    """Look at both ends of a tar: not at all of it, which may be long."""
    try:
        with TarReader(path) as reader:
            next(reader.members(), None)
            if any(reader.read(max(0, reader.num_bytes - TAR_BLOCK_BYTES), TAR_BLOCK_BYTES)):
                return f"{path}: truncated: it has no end-of-archive block; copy or write the shard again"
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    return None


def _spreads(facts: NDArray[np.void]) -> list[Spread]:
    """Say how long the samples are; images and videos of unknown size are left out."""
    has = {
        "text_bytes": facts["text_bytes"] > 0,
        "num_images": facts["num_images"] > 0,
        "image_width": facts["image_width"] > 0,
        "image_height": facts["image_height"] > 0,
        "image_pixels": facts["image_pixels"] > 0,
        "num_videos": facts["num_videos"] > 0,
        "video_frames": facts["video_frames"] > 0,
        "video_seconds": facts["video_seconds"] > 0,
        "video_width": facts["video_width"] > 0,
        "video_height": facts["video_height"] > 0,
    }
    spreads = []
    for name, chosen in has.items():
        values = facts[name][chosen]
        if len(values):
            low, median, high, top = (float(v) for v in np.percentile(values, [0, 50, 95, 100]))
            spreads.append(Spread(name, len(values), low, median, high, top))
    return spreads


def describe_info(info: ShardSetInfo) -> str:
    """Write a summary for people."""
    lines = [
        f"{_counted(info.num_shards)}, {info.num_bytes / 1e9:,.2f} GB, {info.num_samples:,} samples in "
        f"{_counted(info.num_indexed, 'with an index')}"
    ]
    if info.num_stale:
        lines.append(
            f"{_counted(info.num_stale, 'of another time')} than the index says (`vlm-dist shards verify` compares)"
        )
    lines.append(_counted(info.num_with_checksums, "with checksums of all content"))
    if info.columns:
        width = max(len(column.name) for column in info.columns)
        lines += ["", f"{'column':<{width}}  filled  kind"]
        for column in info.columns:
            share = "" if column.filled is None else f"{column.filled:.1%}"
            lines.append(f"{column.name:<{width}}  {share:>6}  {column.kind}")
    if info.lengths:
        lines += ["", f"{'length':<14}{'samples':>12}{'min':>12}{'median':>12}{'95%':>12}{'max':>12}"]
        for row in info.lengths:
            figures = "".join(f"{value:>12,.{0 if value == round(value) else 1}f}" for value in _figures(row))
            lines.append(f"{row.name:<14}{row.num_samples:>12,}{figures}")
    if info.damaged:
        lines += ["", f"{_counted(len(info.damaged))} cannot be used:", *_listed(info.damaged)]
    if info.not_indexed:
        lines += ["", f"{_counted(len(info.not_indexed), 'without an index')} (`vlm-dist shards index` makes one):"]
        lines += _listed(info.not_indexed)
    return "\n".join(lines)


def _counted(count: int, which: str = "") -> str:
    return f"{count:,} shard{'' if count == 1 else 's'}" + (f" {which}" if which else "")


def _listed(lines: Sequence[str]) -> list[str]:
    more = [f"  and {len(lines) - _MAX_LISTED:,} more"] if len(lines) > _MAX_LISTED else []
    return [*(f"  {line}" for line in lines[:_MAX_LISTED]), *more]


def _figures(row: Spread) -> tuple[float, float, float, float]:
    return row.min, row.median, row.p95, row.max
