"""Which members of a sample a column means, where shards name the same thing in several ways.

A shard set often has some pictures as `jpg` and others as `png`. Two kinds of column take either:

* `"jpg;png;webp"`, webdataset's notation: the first of them that the sample has.
* `image` and `video`: the sample's only picture or video, whatever its extension. They exist where the tars have media
  of that kind, no sample has two of them (a photograph `jpg` and a mask `png`, say: then a name has to choose), and
  nothing else has that name. Members with names of their own (`left.jpg`, `right.jpg`) are not meant.

Several pictures of one sample have numbers: `image_000.jpg`, `image_001.png`, … are a list in the column `image`, and
so are `left_000.jpg`, … in a column `left`. In one set of shards a sample may have a list and another a single picture.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.index.facts import member_kind

ANY_OF = ";"
_KINDS = ("image", "video")
_NUMBERED = re.compile(r"^([a-z_][\w-]*)_(\d+)[.][^.]+$")


def single_media(present: Mapping[str, NDArray[np.bool_]]) -> tuple[str, ...]:
    """List the kinds of media of which no sample has more than one plain member.

    Args:
        present: member -> [N], whether a sample has it.
    """
    single = []
    for kind in _KINDS:
        columns = [has for member, has in present.items() if _is_plain(member, kind)]
        if columns and int(np.sum(columns, axis=0).max(initial=0)) <= 1:
            single.append(kind)
    return tuple(single)


def media_columns(
    shards: Iterable[tuple[Sequence[str], Sequence[str]]], taken: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """Find the columns `image` and `video` of a shard set, and those of numbered members.

    Args:
        shards: of each shard, its members and its kinds of single media.
        taken: names that the data has already.

    Returns:
        column -> the members that it may mean.
    """
    rows = list(shards)
    found: dict[str, tuple[str, ...]] = {}
    for kind in _KINDS:
        having = [(members, single) for members, single in rows if any(_is_plain(m, kind) for m in members)]
        if having and kind not in taken and all(kind in single for _, single in having):
            found[kind] = tuple(sorted({m for members, _ in having for m in members if _is_plain(m, kind)}))
    for column, numbered in _numbered_columns({m for members, _ in rows for m in members}).items():
        is_ambiguous = column not in found and any(_is_plain(m, column) for members, _ in rows for m in members)
        if column not in taken and not is_ambiguous:
            found[column] = (*found.get(column, ()), *numbered)
    return found


def is_numbered(member: str) -> bool:
    """Whether a member is one of several, `image_000.jpg`."""
    return member_kind(member) in _KINDS and _NUMBERED.match(member) is not None


def one_per_sample(members: Iterable[str]) -> list[str]:
    """Leave out the further ones of numbered members: what has `image_001.jpg` has `image_000.jpg`, too."""
    numbers = {member: int(match.group(2)) if (match := _NUMBERED.match(member)) else None for member in members}
    first = min((number for number in numbers.values() if number is not None), default=None)
    return [member for member, number in numbers.items() if number is None or number == first]


def _numbered_columns(members: Collection[str]) -> dict[str, list[str]]:
    """Column -> its members: first those without a number, `left.jpg`, then `left_000.jpg`, … in order."""
    columns: dict[str, list[tuple[int, str]]] = {}
    for member in members:
        match = _NUMBERED.match(member) if is_numbered(member) else None
        if match is not None:
            columns.setdefault(match.group(1), []).append((int(match.group(2)), member))
    alone = {
        column: sorted(m for m in members if m.rpartition(".")[0] == column and member_kind(m) in _KINDS)
        for column in columns
    }
    return {column: [*alone[column], *(member for _, member in sorted(columns[column]))] for column in sorted(columns)}


def alternatives(column: str) -> tuple[str, ...]:
    """Split a column name at its semicolons; a plain name gives itself."""
    return tuple(dict.fromkeys(part.strip() for part in column.split(ANY_OF) if part.strip()))


def _is_plain(member: str, kind: str) -> bool:
    return "." not in member and member_kind(member) == kind
