"""From a row (of JSON or of a Hugging Face dataset) to a sample: which columns are media, and what the JSON holds."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from vlm_dist.data.index.facts import media_kind, member_kind
from vlm_dist.data.shards.build.bad_records import BadRecord
from vlm_dist.data.shards.build.conversations import check_conversation, extract_media, is_conversation
from vlm_dist.data.shards.build.media import MediaReader
from vlm_dist.data.shards.build.records import Held, Record
from vlm_dist.data.shards.build.settings import BuildSettings
from vlm_dist.data.shards.build.sniff import sniff_format
from vlm_dist.data.sources.columns import ColumnNames
from vlm_dist.errors import DataError

_NOT_PLAIN = re.compile(r"[^a-z0-9_-]+")


@dataclass
class Columns:
    """What the columns of a data set are, learned record by record in the order of the source.

    Attributes:
        seen: all columns, after renaming, in the order in which they appeared.
        media: media columns -> "image" or "video", the first of a kind first.
        messages: the column of conversations.
    """

    seen: dict[str, None] = field(default_factory=dict)
    media: dict[str, str] = field(default_factory=dict)
    messages: str | None = None
    decided: set[str] = field(default_factory=set)

    def first(self) -> dict[str, str]:
        """Kind -> the first column of that kind, whose members need no name but their extension."""
        return {kind: column for column, kind in reversed(self.media.items())}


@dataclass(frozen=True, slots=True)
class Draft:
    """A checked row whose media are not read yet."""

    key: Any
    texts: dict[str, Any]  # what the JSON member will hold
    media: tuple[tuple[str, str, Any], ...]  # (column, kind that is expected, item)
    first: Mapping[str, str]  # kind -> first column of that kind


class RowMaker:
    """Makes samples of rows.

    Args:
        settings: of the build.
        typed: columns of Image or Video type -> kind.
        media: reads their files.
    """

    def __init__(self, settings: BuildSettings, typed: Mapping[str, str], media: MediaReader) -> None:
        self._settings = settings
        self._media = media
        self._own_to_new = {own: new for new, own in settings.columns.items()}
        self._declared = dict.fromkeys(settings.image_columns, "image") | dict.fromkeys(settings.video_columns, "video")
        self._typed = {self._own_to_new.get(name, name): kind for name, kind in typed.items()}
        self._own: dict[str, None] = {}
        self.columns = Columns(messages=settings.messages_column)

    @property
    def messages_column(self) -> str | None:
        """The column of conversations, if there is one."""
        return self.columns.messages

    def observe(self, record: Record) -> None:
        """Learn the columns of a record; records must come in the order of the source."""
        if record.fields is None:
            return
        self._own.update(dict.fromkeys(record.fields))
        columns = self.columns
        for column, value in self._renamed(record).items():
            columns.seen[column] = None
            if value is None:
                continue
            if columns.messages is None and column not in columns.decided and is_conversation(column, value):
                columns.messages = column
            if column == columns.messages:
                columns.decided.add(column)
                for kind, items in extract_media(value)[1].items():
                    if items and kind not in columns.media.values():
                        columns.media[kind] = kind
            elif column not in columns.decided and (first := next(_items(value), None)) is not None:
                columns.decided.add(column)  # else by the first row that has a value
                found = self._kind(column, first)
                if found is not None:
                    columns.media[column] = found

    def check_names(self) -> None:
        """See that the columns that the settings name were there, when all records have been observed.

        Raises:
            DataError: listing the columns that there are.
        """
        settings = self._settings
        ColumnNames("--columns", list(self._own), settings.columns)
        there = {self._own_to_new.get(own, own): None for own in self._own}
        named = {
            "--image-column": settings.image_columns,
            "--video-column": settings.video_columns,
            "--messages-column": (settings.messages_column,),
            "--key-column": (settings.key_column,),
            "--drop": settings.drop,
        }
        for option, names in named.items():
            for name in names:
                if name is not None and name not in there:
                    raise DataError(f"{option}: there is no column {name!r}; there are: {', '.join(there)}")

    def draft(self, record: Record) -> Draft:
        """Check a record without reading the files of its media.

        Raises:
            BadRecord: it cannot be used.
            DataError: media paths have no folder to start in.
        """
        fields = self._renamed(record)
        key = fields.get(self._settings.key_column) if self._settings.key_column else None
        inside: dict[str, list[Any]] = {}
        messages = self.columns.messages
        if messages is not None and messages in fields:
            fields[messages], inside = extract_media(fields[messages])
        media: list[tuple[str, str, Any]] = []
        first = self.columns.first()
        for column, kind in self.columns.media.items():
            items = list(_items(fields.pop(column, None)))
            named = inside.get(kind, []) if first[kind] == column else []
            if items and named:
                raise BadRecord("conversation", f"{kind}s stand in the messages and in the column {column!r}")
            media += [(column, kind, item) for item in (*items, *named)]
        if not fields and not media:
            raise BadRecord("empty", "the record has no columns")
        if messages is not None:
            counts = {kind: sum(column == name for column, _, _ in media) for kind, name in first.items()}
            check_conversation(fields.get(messages), messages, counts)
        for column, _, item in media:
            self._media.check(item, column in self._typed)
        return Draft(key, fields, tuple(media), first)

    def members(self, draft: Draft) -> dict[str, Any]:
        """Read the media of a draft, and name everything as tar members.

        Raises:
            BadRecord: a file cannot be read, or is no image and no video.
        """
        found: dict[tuple[str, str], list[tuple[str, bytes]]] = {}
        for column, kind, item in draft.media:
            data, extension = self._media.read(item, column in self._typed)
            real_kind = member_kind(extension)
            # a column may have both: then each kind is a column of its own
            own = column if real_kind == kind else real_kind
            found.setdefault((own, real_kind), []).append((extension, data))
        members: dict[str, Any] = {"json": _jsonable(draft.texts)}
        for (column, kind), items in found.items():
            stem = None if draft.first.get(kind, column) == column else _plain_name(column)
            for number, (extension, data) in enumerate(items):
                members[_member_name(stem, kind, number, len(items), extension)] = data
        return members

    def _renamed(self, record: Record) -> dict[str, Any]:
        if record.fields is None:
            reason = f" ({record.problem})" if record.problem else ""
            raise BadRecord("malformed", f"the record is not a JSON object{reason}")
        renamed = {self._own_to_new.get(name, name): value for name, value in record.fields.items()}
        return {name: value for name, value in renamed.items() if name not in self._settings.drop}

    def _kind(self, column: str, first: Any) -> str | None:
        """Say what a column holds by its type, the settings or its first value."""
        if column in self._typed:
            return self._typed[column]
        if self._declared:
            return self._declared.get(column)
        if isinstance(first, bytes):
            extension = sniff_format(first)
            return member_kind(extension) if extension is not None else None
        if isinstance(first, str):
            if first.startswith(("data:image/", "data:video/")):
                return first[5:10]
            return media_kind(first)
        return None


def _items(value: Any) -> Iterator[Any]:
    """Yield a value, or the elements of a list (also of one that is written as JSON), without None."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            value = json.loads(value)
        except ValueError:
            yield value
            return
    if isinstance(value, list | tuple):
        for item in value:
            yield from _items(item)
    elif isinstance(value, Mapping) and value and value.keys() <= {"bytes", "path", "url"}:  # an image without its type
        yield from _items(next((value[name] for name in ("bytes", "path", "url") if value.get(name)), None))
    elif value is not None:
        yield value


def _plain_name(column: str) -> str:
    name = _NOT_PLAIN.sub("_", column.lower())
    return name if name[:1].isalpha() else f"_{name}"


def _member_name(stem: str | None, kind: str, number: int, count: int, extension: str) -> str:
    """`jpg`, `mask.jpg`; of several `image_000.jpg`, `mask_000.jpg`."""
    if count > 1:
        return f"{stem or kind}_{number:03d}.{extension}"
    return extension if stem is None else f"{stem}.{extension}"


def _jsonable(value: Any) -> Any:
    """Write dates, decimals and what is no number as JSON has it.

    Raises:
        BadRecord: ("unwritable") bytes and other values that it has no form for.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Decimal | datetime.timedelta):
        return str(value)
    what = "bytes that are no image or video" if isinstance(value, bytes | Held) else f"a {type(value).__name__}"
    raise BadRecord("unwritable", f"a column holds {what}; leave it out with --drop COLUMN")
