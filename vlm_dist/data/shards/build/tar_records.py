"""Samples of existing tars, also of tars whose keys break the convention; their members as bytes."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_dist.data.index.facts import member_kind
from vlm_dist.data.index.tar_headers import TarMember, TarReader
from vlm_dist.data.index.tar_scan import check_extensions
from vlm_dist.data.shards.build.bad_records import BadRecord
from vlm_dist.data.shards.build.media import check_media
from vlm_dist.data.shards.build.records import Held, Record, stamp_of_files
from vlm_dist.data.shards.build.settings import BuildSettings
from vlm_dist.data.sources.columns import ColumnNames
from vlm_dist.data.storage.find import find_files
from vlm_dist.data.storage.open_files import OpenFiles
from vlm_dist.errors import DataError

_MEMBER_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_SUFFIXES = re.compile(r"^(.*[^/])[.]([^./]+)$")


class TarRecords:
    """Groups the members of tars into samples and reads them by offset.

    Members that follow each other with one key are a sample; the key ends at the first dot of the base name. Where that
    gives something impossible (`img_1.5x.jpg`, `img_1.7x.jpg`: the dot belongs to the key) it ends at the last dot.
    A member that a sample has already begins the next sample. Members of one key that other samples' members stand
    between are one sample all the same, as in a tar that has all pictures first.

    Args:
        pattern: directory, file, glob or brace pattern.
        skip_bad: use what stands before the damage in a damaged tar; otherwise it is an error.

    Raises:
        DataError: if there are no tars, or one is damaged.

    Attributes:
        damaged: tars of which only a part can be used, each with the reason.
        num_other: members that are no part of a sample (no extension, links), and are left out.
        num_repaired: samples whose key had a dot.
        num_joined: samples whose members did not follow each other.
    """

    def __init__(self, pattern: str, skip_bad: bool) -> None:
        self.name = pattern
        self.typed: dict[str, str] = {}
        self.media_root: Path | None = None
        self.own_folders: Sequence[Path] = ()
        paths = find_files("--path", pattern, (".tar",))
        self._paths = paths
        self._files = OpenFiles(paths)
        self.stamp = stamp_of_files(paths)
        self.damaged: list[tuple[Path, str]] = []
        self.num_other = 0
        self.num_repaired = 0
        self._joined: set[int] = set()
        self._last: dict[str, int] = {}  # key -> number of its last sample, within the tar that is scanned
        self._keys: list[str] = []
        self._tars = array("l")
        self._layouts = array("l")  # of each sample: which extensions it has
        self._starts = array("q")  # of each sample: where its spans begin
        self._spans = array("q")  # offset, size, offset, size, …
        self._layout_numbers: dict[tuple[str, ...], int] = {}
        self._layout_names: list[tuple[str, ...]] = []
        for number, path in enumerate(paths):
            self._scan(number, path, skip_bad)
        if not self._keys:
            raise DataError(f"{pattern}: no samples (members named <key>.<extension>) in {len(paths)} tars")

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def num_joined(self) -> int:
        """See above."""
        return len(self._joined)

    def read(self, number: int) -> Record:
        """Read a sample's members."""
        spans = self._members(number)
        tar = self._tars[number]
        fields = {name: self._files.read(tar, offset, size) for name, offset, size in spans}
        return Record(number, self._where(number), dict(fields), self._keys[number])

    def outline(self, numbers: Sequence[int]) -> Iterator[Record]:
        """Name the members of samples, without their data."""
        for number in numbers:
            fields = dict.fromkeys((name for name, _, _ in self._members(number)), Held())
            yield Record(number, self._where(number), dict(fields), self._keys[number])

    def _where(self, number: int) -> str:
        return f"{self._paths[self._tars[number]].name}, {self._keys[number]}"

    def _members(self, number: int) -> list[tuple[str, int, int]]:
        names = self._layout_names[self._layouts[number]]
        start = self._starts[number]
        return [(name, self._spans[start + 2 * i], self._spans[start + 2 * i + 1]) for i, name in enumerate(names)]

    def _scan(self, number: int, path: Path, skip_bad: bool) -> None:
        open_key, group = "", list[tuple[str, TarMember]]()
        self._last = {}
        try:
            with TarReader(path) as reader:
                for member in reader.members():
                    match = _MEMBER_NAME.match(member.name)
                    if member.is_directory:
                        continue
                    if match is None or not member.is_regular:
                        self.num_other += 1
                        continue
                    key, extension = match.group(1), match.group(2).lower()
                    if key != open_key or any(extension == name for name, _ in group):
                        self._close(number, open_key, group)
                        open_key, group = key, []
                    group.append((extension, member))
        except (DataError, OSError) as error:
            if not skip_bad:
                raise DataError(
                    f"{error}\nor use what stands before the damage, with --skip-bad"
                    if isinstance(error, DataError)
                    else f"{path}: cannot read the tar: {error}"
                ) from error
            self.damaged.append((path, str(error)))
            group = group[:0]  # the last sample before the damage may lack members
        self._close(number, open_key, group)

    def _close(self, tar: int, key: str, group: list[tuple[str, TarMember]]) -> None:
        if not group:
            return
        names = [extension for extension, _ in group]
        try:
            check_extensions(key, names)
        except DataError:
            self._close_dotted(tar, group)
            return
        self._add(tar, key, group)

    def _close_dotted(self, tar: int, group: list[tuple[str, TarMember]]) -> None:
        """Cut the names of members at their last dot instead."""
        samples: dict[str, list[tuple[str, TarMember]]] = {}
        for _, member in group:
            match = _SUFFIXES.match(member.name)
            assert match is not None
            samples.setdefault(match.group(1), []).append((match.group(2).lower(), member))
        for key, members in samples.items():
            self.num_repaired += 1
            self._add(tar, key, members)

    def _add(self, tar: int, key: str, group: list[tuple[str, TarMember]]) -> None:
        spans = [(extension, member.offset, member.size) for extension, member in group]
        number = self._last.get(key)
        if number is None or self._has_any(number, {extension for extension, _ in group}):
            number = self._last[key] = len(self._keys)
            self._keys.append(key)
            self._tars.append(tar)
            self._layouts.append(0)
            self._starts.append(0)
        else:
            spans = [*self._members(number), *spans]  # where they stood is given up
            self._joined.add(number)
        layout = tuple(extension for extension, _, _ in spans)
        self._layouts[number] = self._layout_numbers.setdefault(layout, len(self._layout_numbers))
        if len(self._layout_names) < len(self._layout_numbers):
            self._layout_names.append(layout)
        self._starts[number] = len(self._spans)
        for _, offset, size in spans:
            self._spans.extend((offset, size))

    def _has_any(self, number: int, extensions: set[str]) -> bool:
        return not extensions.isdisjoint(self._layout_names[self._layouts[number]])


def check_text_members(members: dict[str, bytes]) -> None:
    """Refuse JSON and text members that training could not read.

    Raises:
        BadRecord: ("malformed") naming the member.
    """
    for name, data in members.items():
        try:
            if member_kind(name) == "json":
                json.loads(data)
            elif member_kind(name) == "text":
                data.decode("utf-8")
        except (ValueError, RecursionError) as error:
            raise BadRecord("malformed", f"member {name!r} is damaged: {error}") from error


class TarMaker:
    """Makes samples of the samples of other tars: the same members, renamed or left out.

    Args:
        settings: of the build.
    """

    def __init__(self, settings: BuildSettings) -> None:
        self._drop = frozenset(settings.drop)
        self._renames = settings.columns
        self._own_to_new = {own: new.lower() for new, own in settings.columns.items()}
        self._verify_images = settings.verify_images
        self._seen: dict[str, None] = {}

    @property
    def messages_column(self) -> str | None:
        """What conversations are in is not known."""
        return None

    def observe(self, record: Record) -> None:
        """Learn the members that there are."""
        self._seen.update(dict.fromkeys(record.fields or ()))

    def check_names(self) -> None:
        """See that the members that the settings name were there.

        Raises:
            DataError: listing the members that there are.
        """
        ColumnNames("--columns", list(self._seen), self._renames)
        unknown = sorted(self._drop - self._seen.keys() - self._renames.keys())
        if unknown:
            raise DataError(f"--drop: there is no member {unknown[0]!r}; there are: {', '.join(self._seen)}")

    def draft(self, record: Record) -> Record:
        """Rename members and leave some out.

        Raises:
            BadRecord: ("empty", "members") nothing is left, or two members get one name.
        """
        fields: dict[str, Any] = {}
        for own, value in (record.fields or {}).items():
            name = self._own_to_new.get(own, own)
            if own in self._drop or name in self._drop:
                continue
            if name in fields:
                raise BadRecord("members", f"two members get the name {name!r}")
            fields[name] = value
        if not fields:
            raise BadRecord("empty", "no members are left")
        return Record(record.number, record.where, fields, record.key)

    def members(self, draft: Record) -> dict[str, Any]:
        """Check the members that have been read.

        Raises:
            BadRecord: ("malformed", "bad_media") one is damaged.
        """
        members: dict[str, bytes] = dict(draft.fields or {})
        for name, data in members.items():
            if member_kind(name) in ("image", "video"):
                check_media(f"member {name!r}: ", name.rsplit(".", 1)[-1], data, self._verify_images)
        check_text_members(members)
        return members
