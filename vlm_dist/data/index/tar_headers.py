"""Walks over the headers of a tar by positioned reads, without its data: many times faster than tarfile.

The common header (one block of 512 bytes with octal fields) is parsed here, with the long names and exact times that
PAX and GNU put before it. All else (sizes above 8 GiB, sparse files, global headers, whatever looks odd) is parsed by
tarfile, from the same place. So a walk gives the members that tarfile gives, but takes no damage for the end of the
archive.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from vlm_dist.errors import DataError

TAR_BLOCK_BYTES = 512

_SMALL_STRIDE_BYTES = 16 * 1024
_LARGE_READ_BYTES = 64 * 1024  # members lie close together: one read serves several
_SMALL_READ_BYTES = 8 * 1024  # a tail, a header and the head of the next member's data
_NAME_BYTES = 100
_MAX_END_BYTES = 1024 * 1024  # tar fills the last record with zeros: 10 KiB by default, rarely more

_ZERO_BLOCK = bytes(TAR_BLOCK_BYTES)
_REGULAR = frozenset((0, *b"07"))
_WITHOUT_DATA = frozenset(b"123456")  # links, devices, directories, pipes
_DIRECTORY = ord("5")
_PAX, _GNU_LONG_NAME = ord("x"), ord("L")
_MAX_EXTENSION_BYTES = 16 * 1024
_PAX_RECORD = re.compile(rb"([1-9]\d{0,5}) ([^=\n]+)=")
_PAX_WITHOUT_LAYOUT = frozenset((b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname", b"comment"))
_PAX_KEYS_OF_LAYOUT = ("path", "size", "linkpath", "GNU.sparse.name", "GNU.sparse.size", "GNU.sparse.realsize")

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}
_DAMAGED = "copy or write the shard again"


class TarMember(NamedTuple):
    """A member of a tar; `offset` is where its data starts, in bytes."""

    name: str
    is_regular: bool
    is_directory: bool
    offset: int
    size: int


class TarReader:
    """Reads ranges of a file, and the headers of a tar, with as few system calls as its members' sizes allow.

    Args:
        path: of the tar.

    Raises:
        OSError: if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.num_bytes = os.fstat(self._descriptor).st_size
        self._start, self._stop, self._window = 0, 0, b""
        self._read_bytes = _SMALL_READ_BYTES
        self._archive: tarfile.TarFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Read a range; shorter only at the end of the file."""
        start = offset - self._start
        if start >= 0 and offset + size <= self._stop:
            return self._window[start : start + size]
        wanted = max(size, self._read_bytes)
        window = os.pread(self._descriptor, wanted, offset)
        while len(window) < size:  # Linux reads at most 2 GiB at once
            more = os.pread(self._descriptor, size - len(window), offset + len(window))
            if not more:
                break
            window += more
        self._start, self._stop, self._window = offset, offset + len(window), window
        return window if len(window) == size else window[:size]

    def stream(self, offset: int, size: int) -> io.BufferedReader:
        """Open the data of a member as a file."""
        return io.BufferedReader(_Range(self._descriptor, offset, size), 4096)

    def members(self) -> Iterator[TarMember]:
        """Walk over all members.

        Raises:
            DataError: if this is no tar, or a damaged, truncated or compressed one.
            OSError: if it cannot be read.
        """
        position, num_members = 0, 0
        while True:
            header = self.read(position, TAR_BLOCK_BYTES)
            if len(header) < TAR_BLOCK_BYTES:
                raise self._cut(position)
            if header == _ZERO_BLOCK:
                self._check_end(position)
                return
            member = self._parse(header, position)
            if member is not None:
                blocks = -(-member.size // TAR_BLOCK_BYTES) if member.is_regular else 0
                position = member.offset + blocks * TAR_BLOCK_BYTES
            else:
                member, position = self._parse_with_tarfile(header, position)
            if member.is_regular and member.offset + member.size > self.num_bytes:
                raise DataError(
                    f"{self.path}: truncated inside {member.name!r}: its data ends at byte "
                    f"{member.offset + member.size}, the file at {self.num_bytes}; {_DAMAGED}"
                )
            yield member
            num_members += 1
            is_dense = position < num_members * _SMALL_STRIDE_BYTES
            self._read_bytes = _LARGE_READ_BYTES if is_dense else _SMALL_READ_BYTES

    @property
    def _has_global_names(self) -> bool:
        """Whether a global header says something of all members' names or sizes."""
        return self._archive is not None and any(key in self._archive.pax_headers for key in _PAX_KEYS_OF_LAYOUT)

    def _parse(self, header: bytes, position: int) -> TarMember | None:
        """Parse a plain header, or one with a plain long name before it; None leaves it to tarfile."""
        fields = _plain_fields(header)
        if fields is None or self._has_global_names:
            return None
        kind, name, size = fields
        offset = position + TAR_BLOCK_BYTES
        if kind in (_PAX, _GNU_LONG_NAME):
            if size > _MAX_EXTENSION_BYTES:
                return None
            next_header = offset + -(-size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
            extension = self.read(offset, size)
            long_name = _pax_name(extension) if kind == _PAX else extension.partition(b"\0")[0]
            fields = _plain_fields(self.read(next_header, TAR_BLOCK_BYTES)) if long_name is not None else None
            if fields is None or long_name is None:
                return None
            kind, name, size = fields
            name = long_name.decode("utf-8", "surrogateescape") if long_name else name
            offset = next_header + TAR_BLOCK_BYTES
        is_regular = kind in _REGULAR
        # of a directory; in the oldest tars a slash is the only mark of one
        if name.endswith("/") or not (is_regular or kind in _WITHOUT_DATA):
            return None
        return TarMember(name, is_regular, kind == _DIRECTORY, offset, size)

    def _parse_with_tarfile(self, header: bytes, position: int) -> tuple[TarMember, int]:
        """Parse any header, with the extended headers before it.

        Returns:
            The member, and where the next header stands.
        """
        try:
            if self._archive is None:
                whole = self.stream(0, self.num_bytes)
                self._archive = tarfile.TarFile(fileobj=whole, encoding="utf-8", errors="surrogateescape")
            archive = self._archive
            assert archive.fileobj is not None
            archive.fileobj.seek(position)
            info = tarfile.TarInfo.fromtarfile(archive)
        except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            raise self._bad_header(header, position, error) from error
        if info.size < 0 or archive.offset <= position or info.offset_data < position:
            raise self._bad_header(header, position, ValueError("impossible size"))
        is_regular = info.isreg() and not info.issparse()
        return TarMember(info.name, is_regular, info.isdir(), info.offset_data, info.size), archive.offset

    def _bad_header(self, header: bytes, position: int, error: Exception) -> DataError:
        # an extended header is followed by another, and the file may end between them
        if isinstance(error, tarfile.TarError) and any(
            word in str(error) for word in ("truncated", "empty header", "end of data")
        ):
            return self._cut(position)
        if header[156:157] in (b"x", b"g", b"L", b"K"):
            size = int(header[124:136].strip(b"\0 ") or b"0", 8) if header[124:136].strip(b"\0 ").isdigit() else 0
            if position + 2 * TAR_BLOCK_BYTES + -(-size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES > self.num_bytes:
                return self._cut(position)
        if position > 0:
            return DataError(f"{self.path}: damaged header at byte {position} ({error}); {_DAMAGED}")
        return self._no_tar(header) or DataError(f"{self.path}: damaged header at byte 0 ({error}); {_DAMAGED}")

    def _cut(self, position: int) -> DataError:
        num_left = self.num_bytes - position
        if self.num_bytes == 0:
            return DataError(f"{self.path}: the file is empty (truncated to 0 bytes); {_DAMAGED}")
        if num_left <= 0:
            return DataError(
                f"{self.path}: truncated after {self.num_bytes} bytes (no end-of-archive block); {_DAMAGED}"
            )
        alien = self._no_tar(self.read(0, self.num_bytes)) if position == 0 else None
        return alien or DataError(f"{self.path}: truncated inside the header at byte {position}; {_DAMAGED}")

    def _no_tar(self, start: bytes) -> DataError | None:
        """Say what a file is that does not even start like a tar, if that can be told."""
        for magic, name in _COMPRESSED.items():
            if start.startswith(magic):
                return DataError(
                    f"{self.path}: a compressed file ({name}) cannot be read by offset; decompress it, once, to .tar"
                )
        text = start[:40].decode("utf-8", "replace")
        is_page = text.lstrip()[:1] in ("<", "{")
        if b"\0" in start[:_NAME_BYTES] or (len(start) < _NAME_BYTES and not is_page):
            return None
        what = " (a web page or an error message instead of the shard?)" if is_page else ""
        return DataError(f"{self.path}: not a tar: it starts with {text!r}{what}; {_DAMAGED}")

    def _check_end(self, position: int) -> None:
        """See that nothing but zeros follows: a hole of zeros in the middle looks like the end of the archive."""
        num_left = self.num_bytes - position
        rest = self.read(position, min(num_left, _MAX_END_BYTES))
        if num_left > _MAX_END_BYTES or any(rest):
            raise DataError(
                f"{self.path}: damaged: zeros at byte {position} end the archive, but {num_left} bytes follow (a hole "
                f"in a copied file, or tars joined by cat?); {_DAMAGED}, or join with tar --concatenate"
            )


def _plain_fields(header: bytes) -> tuple[int, str, int] | None:
    """Read kind, name and size from a header whose fields are as nearly all tools write them; its sum must be right."""
    size_field, sum_field = header[124:135], header[148:154]
    if len(header) < TAR_BLOCK_BYTES or not (size_field.isdigit() and sum_field.isdigit()):
        return None
    if header[135] not in b"\0 " or header[154] not in b"\0 ":
        return None
    # Adler-32 has the sum of the bytes in its lower half, exact for 256 of them; the sum's own field counts as spaces
    total = (zlib.adler32(header[:256]) & 0xFFFF) + (zlib.adler32(header[256:]) & 0xFFFF) - 2
    try:
        if int(sum_field, 8) != total - sum(header[148:156]) + 8 * ord(" "):
            return None
        size = int(size_field, 8)
    except ValueError:  # 8 or 9
        return None
    name = header[:_NAME_BYTES].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    if header[345]:
        name = header[345:500].partition(b"\0")[0].decode("utf-8", "surrogateescape") + "/" + name
    return header[156], name, size


def _pax_name(records: bytes) -> bytes | None:
    """Find the name in an extended header: empty where it has none, None where it says more than names and times."""
    name = b""
    position = 0
    while position < len(records):
        match = _PAX_RECORD.match(records, position)
        if match is None:
            return None
        length, key = int(match.group(1)), match.group(2)
        value = records[match.end() : position + length - 1]
        if length > len(records) - position or match.end() >= position + length or records[position + length - 1] != 10:
            return None
        if key == b"path":
            name = value
        elif key not in _PAX_WITHOUT_LAYOUT:
            return None
        position += length
    return name


class _Range(io.RawIOBase):
    """A range of an open file as a file."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        wanted = max(0, min(len(view), self._size - self._position))
        num_read = os.preadv(self._descriptor, [view[:wanted]], self._offset + self._position) if wanted else 0
        self._position += num_read
        return num_read
