"""Media columns: images and videos as bytes, or as paths under a root that nothing escapes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_dist.data.index.facts import SampleFacts, media_kind, text_bytes
from vlm_dist.data.media.named import NamedBytes
from vlm_dist.data.storage.open_files import with_retries
from vlm_dist.data.storage.remote.urls import shown
from vlm_dist.errors import DataError, SkipSample, printable

_MAX_PATH_BYTES = 4096
_MAX_NAME_BYTES = 255
_MAX_EXAMPLES = 3

log = logging.getLogger(__name__)


class OutsideRoot(SkipSample):
    """A media path leads where nothing may be read: its sample is damaged, or worse.

    Args:
        message: names the path and the folder.
    """

    def __init__(self, message: str) -> None:
        super().__init__("bad_sample", message)


class MediaRoot:
    """The folder that media paths of a data set are relative to; nothing outside it is read.

    Args:
        where: names the source in errors.
        root: None where the data has no media paths to resolve.
        own_folders: where paths that the data set's builder wrote may lead without a root.
        build_command: writes the data into shards; told where it cannot be trained on as it is.
    """

    def __init__(
        self,
        where: str,
        root: Path | None,
        own_folders: Sequence[Path] = (),
        build_command: str = "vlm-dist shards build --path DATA --out DIRECTORY",
    ) -> None:
        self._where = where
        self._build_command = build_command
        self.root = root
        self._real = os.path.realpath(root) if root is not None else None
        self._own_real = sorted({os.path.realpath(folder) for folder in own_folders})

    def resolve(self, value: str) -> Path:
        """Return the file that a media path means.

        Raises:
            OutsideRoot: for a path outside the root, symbolic links followed.
            SkipSample: no file system takes it for a path.
            DataError: for a URL, and where there is no root.
        """
        if not _can_be_path(value):
            raise _no_path(value)
        if "://" in value:
            raise DataError(
                f"{self._where}: {shown(value)!r} is a URL; training fetches no media. "
                f"Write the data into shards once: {self._build_command}"
            )
        if self._real is None:
            raise DataError(
                f"{self._where}: {value!r} is a path, but media_root is not set; set it to the folder of the media"
            )
        real = os.path.realpath(os.path.join(self._real, value))  # noqa: PTH118 - Path would cost more per sample
        if os.path.commonpath([real, self._real]) != self._real:
            raise OutsideRoot(
                f"{self._where}: {value!r} leads out of media_root {self.root}; "
                "media must lie under it, also behind symbolic links"
            )
        return Path(real)

    def resolve_own(self, value: str) -> Path:
        """Return the file that a path means which the data set's builder wrote.

        Raises:
            OutsideRoot: for a path outside the root, or without one outside the data set's own folders.
            SkipSample: no file system takes it for a path.
        """
        if self._real is not None or "://" in value:
            return self.resolve(value)
        if not _can_be_path(value):
            raise _no_path(value)
        real = os.path.realpath(value)
        if not any(os.path.commonpath([real, folder]) == folder for folder in self._own_real):
            raise OutsideRoot(
                f"{self._where}: {value!r} is neither in the data set's own folder nor in the cache of `datasets`; "
                "set media_root to the folder that holds its media"
            )
        return Path(real)

    def read(self, path: Path) -> bytes:
        """Read a media file that `resolve` has let pass.

        Raises:
            SkipSample: if there is no such file.
            DataError: if the storage fails.
        """
        try:
            return with_retries(f"{self._where}: {path}", path.read_bytes)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            if self.root is not None and not self.root.is_dir():
                raise DataError(f"{self._where}: media_root {self.root} is not there (any more)") from error
            raise SkipSample("bad_sample", f"media file {path} does not exist") from error


class MediaColumns:
    """Knows which columns of row-shaped data (JSON, Arrow) hold media, and reads them.

    A column is a media column if the caller says so, if its type does, or if its first value ends like the name of an
    image or video file.

    Args:
        root: what paths are relative to.
        declared: the media columns; None finds them by their first values.
        typed: columns of Image or Video type; their paths come from the data set itself.
    """

    def __init__(
        self, root: MediaRoot, declared: frozenset[str] | None = None, typed: Mapping[str, str] | None = None
    ) -> None:
        self.root = root
        self.declared = declared
        self.typed = dict(typed or {})
        self.seen: dict[str, bool] = {}  # column -> is it media
        self.num_files = 0
        self.missing: list[str] = []
        self.outside: list[str] = []

    @property
    def names(self) -> frozenset[str]:
        """The media columns found so far."""
        return frozenset(name for name, is_media in self.seen.items() if is_media)

    def facts_of(self, row: Mapping[str, Any], place: str = "") -> SampleFacts:
        """Collect the length facts of a row, and learn its media columns.

        Args:
            row: of the data.
            place: names it to a person.

        Raises:
            DataError: if a path is a URL, or there is no root for it.
        """
        facts = SampleFacts()
        for column, value in row.items():
            if self._is_media(column, value):
                for item in _items(value):
                    self._add(facts, column, item, place)
            else:
                facts.add_text(text_bytes(value))
        return facts

    def load(self, names: frozenset[str], row: Mapping[str, Any]) -> dict[str, Any]:
        """Replace the paths in media columns by the bytes of their files."""
        return {column: self._load(column, value) if column in names else value for column, value in row.items()}

    def check_missing(self, where: str) -> None:
        """Refuse data whose media are all missing or out of reach; tell of some otherwise.

        Raises:
            DataError: not one of the media files can be read.
        """
        if self.outside and len(self.outside) == self.num_files:
            raise DataError(
                f"all {self.num_files} media files are out of reach: {self.outside[0]}; "
                "set media_root to a folder that holds them all"
            )
        if self.outside:
            log.warning(
                "%s: %d of %d media files are out of reach; their samples are skipped:%s%s",
                where, len(self.outside), self.num_files,
                "".join(f"\n  {printable(path)}" for path in self.outside[:_MAX_EXAMPLES]),
                "\n  …" if len(self.outside) > _MAX_EXAMPLES else "",
            )  # fmt: skip
        if self.missing and len(self.missing) == self.num_files:
            raise DataError(
                f"{where}: none of the {self.num_files} media files exists, e.g. {self.missing[0]}; "
                f"media_root is {self.root.root}, set it to the folder that the paths start in"
            )
        if self.missing:
            log.warning(
                "%s: %d of %d media files are missing, e.g. %s; their samples are skipped",
                where, len(self.missing), self.num_files, self.missing[0],
            )  # fmt: skip

    def _is_media(self, column: str, value: Any) -> bool:
        known = self.seen.get(column)
        if known is None:
            first = next(_items(value), None)
            if column in self.typed:
                known = True
            elif self.declared is not None:
                known = column in self.declared
            elif first is None:
                return False  # decided by the first row that has a value
            else:
                known = isinstance(first, bytes) or (isinstance(first, str) and media_kind(first) is not None)
            self.seen[column] = known
        return known

    def _add(self, facts: SampleFacts, column: str, item: Any, place: str) -> None:
        source: bytes | Path
        kind = self.typed.get(column)
        if isinstance(item, bytes):
            source, kind = item, kind or sniff_kind(item)
        elif isinstance(item, str):
            self.num_files += 1
            try:
                source, kind = self._path(column, item), kind or media_kind(item)
            except OutsideRoot as error:  # the sample is skipped when it is read
                self.outside.append(f"{error.message} ({place})" if place else error.message)
                return
            except SkipSample:
                self.missing.append(_at(place, item[:60]))
                return
            except DataError as error:
                raise DataError(f"{error} (first in {place})" if place else str(error)) from error
            if not source.is_file():
                self.missing.append(_at(place, item))
        else:
            return
        (facts.add_video if kind == "video" else facts.add_image)(source)

    def _load(self, column: str, value: Any) -> Any:
        if isinstance(value, str):
            return NamedBytes.of(self.root.read(self._path(column, value)), printable(value))
        if isinstance(value, list | tuple):
            return [self._load(column, item) for item in value]
        return value

    def _path(self, column: str, value: str) -> Path:
        return self.root.resolve_own(value) if column in self.typed else self.root.resolve(value)


def _at(place: str, path: str) -> str:
    """A path and the record that names it."""
    return printable(f"{path} ({place})" if place else path)


def _no_path(value: str) -> SkipSample:
    return SkipSample("bad_sample", f"{value[:60]!r} is no path of a media file")


def _can_be_path(value: str) -> bool:
    try:
        encoded = value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return (
        b"\0" not in encoded
        and len(encoded) < _MAX_PATH_BYTES
        and max(map(len, encoded.split(b"/"))) <= _MAX_NAME_BYTES
    )


def sniff_kind(data: bytes) -> str:
    """Tell a video from an image by the first bytes."""
    container = data[4:8] in (b"ftyp", b"moov", b"mdat") or data[:4] == b"\x1aE\xdf\xa3"
    return "video" if container or (data[:4] == b"RIFF" and data[8:12] == b"AVI ") else "image"


def _items(value: Any) -> Iterator[Any]:
    """Yield the value, or the values of a list, without None."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _items(item)
    elif value is not None:
        yield value
