"""Shards that cannot be read by offset where they are: written to a file of this machine once, then like any other.

These are the output of a command (`pipe:COMMAND`, webdataset's notation) and compressed tars. The copies stay in the
cache's directory under `spool/` until somebody deletes them: a command may give something else the next time, and a run
that resumes needs what it had. They count within the cache's limit.
"""

from __future__ import annotations

import bz2
import gzip
import logging
import lzma
import os
import shutil
import subprocess
import threading
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vlm_dist.config.masking import masked
from vlm_dist.data.index.tar_headers import TarReader
from vlm_dist.data.storage.find import COMPRESSED, expand_braces, find_files
from vlm_dist.data.storage.remote.shard_cache import SPOOL, NoRoomError, ShardCache
from vlm_dist.data.storage.remote.urls import digest_of
from vlm_dist.data.storage.shard_storage import CacheSettings
from vlm_dist.errors import DataError

PIPE = "pipe:"

_CHUNK_BYTES = 1024 * 1024
_REPORT_BYTES = 5 * 10**9
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_SHOWN_CHARACTERS = 80
_SHOWN_LINES = 5
_SAID_CHARACTERS = 2000

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SpooledShard:
    """A file with the content of a shard.

    Attributes:
        path: of the file.
        name: of what it was made from, which says nothing of this machine: the manifest knows the shard by it.
    """

    path: Path
    name: str


def spool_shards(where: str, patterns: Sequence[str], settings: CacheSettings) -> list[SpooledShard]:
    """Write the output of commands and the content of compressed tars to files; what is there already is kept.

    Args:
        where: names the source in errors.
        patterns: `pipe:` commands and compressed tars, each with braces.
        settings: of the cache, in whose limit these files have their place.

    Returns:
        The files, in the order of the patterns.

    Raises:
        DataError: a command fails, a file is damaged, or they do not fit the cache or the disk.
    """
    origins = [origin for pattern in patterns for origin in _expand(where, pattern)]
    cache = ShardCache(settings.dir, settings.max_bytes)
    spooled = []
    for origin, file_name, name in zip(origins, _file_names(origins), _names(origins), strict=True):
        key = f"{SPOOL}/{file_name}"
        if not cache.has(key):
            _spool(where, origin, cache, key)
        spooled.append(SpooledShard(cache.path(key), name))
    return spooled


def _expand(where: str, pattern: str) -> list[str]:
    if pattern.startswith(PIPE):
        return expand_braces(pattern)
    if pattern.endswith(COMPRESSED):
        return [str(path) for path in find_files(where, pattern, COMPRESSED)]
    raise DataError(
        f"{where}: {masked(pattern)} cannot stand in one source with pipes and compressed shards; make it another"
    )


def _names(origins: Sequence[str]) -> list[str]:
    """What tells the origins apart: commands without their secrets, paths below the folder that they share."""
    folders = {origin: Path(origin).parent.resolve() for origin in origins if not origin.startswith(PIPE)}
    root = os.path.commonpath(list(folders.values())) if folders else ""
    return [
        str((folders[origin] / Path(origin).name).relative_to(root)) if origin in folders else masked(origin)
        for origin in origins
    ]


def _file_names(origins: Sequence[str]) -> list[str]:
    """Name the files of origins: a command by what it is without its secrets, a compressed tar by place and state."""
    texts = [masked(origin) if origin.startswith(PIPE) else _state_of(origin) for origin in origins]
    of_text: dict[str, set[str]] = {}
    for text, origin in zip(texts, origins, strict=True):
        of_text.setdefault(text, set()).add(origin)
    names = []
    for text, origin in zip(texts, origins, strict=True):
        is_told_apart = len(of_text[text]) == 1  # else the difference is in what was masked
        stem = next((Path(origin).name.removesuffix(ending) for ending in COMPRESSED if origin.endswith(ending)), "")
        name = "pipe" if origin.startswith(PIPE) else stem
        names.append(f"{name}-{digest_of(text if is_told_apart else origin)}.tar")
    return names


def _state_of(origin: str) -> str:
    status = Path(origin).stat()
    return f"{Path(origin).resolve()} {status.st_size} {status.st_mtime_ns}"


def _spool(where: str, origin: str, cache: ShardCache, key: str) -> None:
    shown = masked(origin)
    if origin.startswith(PIPE) and len(shown) > _SHOWN_CHARACTERS:
        shown = shown[:_SHOWN_CHARACTERS] + "…"
    log.info("%s: writing %s to %s", where, shown, cache.path(key))

    def write(descriptor: int, on_bytes: Callable[[int], None]) -> int:
        return _write(where, shown, origin, descriptor, on_bytes)

    try:
        cache.fetch(key, None, write, check=lambda copy: _check_whole(where, shown, copy))
    except NoRoomError as error:
        raise DataError(
            f"{where}: {shown} cannot be written: {error}, or delete what no run needs in {cache.directory / SPOOL}. A "
            "stream without an end cannot be read by row, so no run could resume: write as much of it as you train on "
            "into shards (vlm-dist shards build), and read those"
        ) from error


def _write(where: str, shown: str, origin: str, descriptor: int, on_bytes: Callable[[int], None]) -> int:
    written, next_report = 0, _REPORT_BYTES
    with closing(_chunks(where, shown, origin)) as chunks:
        for chunk in chunks:
            on_bytes(written + len(chunk))
            rest = memoryview(chunk)
            while rest:
                count = os.pwrite(descriptor, rest, written)
                rest, written = rest[count:], written + count
            if written >= next_report:
                log.info("%s: %.0f GB of %s are written", where, written / 1e9, shown)
                next_report += _REPORT_BYTES
    return written


def _chunks(where: str, shown: str, origin: str) -> Generator[bytes]:
    """Yield the content; what goes wrong here is the origin's fault, not that of the cache."""
    try:
        with _open(where, shown, origin) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{where}: {shown} cannot be read: {error}") from error


def _check_whole(where: str, shown: str, path: Path) -> None:
    """Refuse what is no whole tar, so that it is made again the next time."""
    try:
        with TarReader(path) as reader:
            for _ in reader.members():
                pass
    except DataError as error:
        raise DataError(f"{where}: {str(error).replace(str(path), shown)}") from error


@contextmanager
def _open(where: str, shown: str, origin: str) -> Iterator[IO[bytes]]:
    if origin.startswith(PIPE):
        with _output_of(where, shown, ["/bin/sh", "-c", origin.removeprefix(PIPE)]) as stream:
            yield stream
    elif origin.endswith(".zst"):
        if shutil.which("zstd") is None:
            raise DataError(f"{where}: {shown} needs the command zstd; install it, or decompress the shards")
        with _output_of(where, shown, ["zstd", "-dcq", "--", origin]) as stream:
            yield stream
    else:
        with _OPENERS[Path(origin).suffix](origin, "rb") as stream:
            yield stream


@contextmanager
def _output_of(where: str, shown: str, command: Sequence[str]) -> Iterator[IO[bytes]]:
    """Run a command of the user's own config; its end is waited for, and its status counts."""
    with subprocess.Popen(  # noqa: S603 - a pipe is a command by definition
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        last_lines: deque[bytes] = deque(maxlen=_SHOWN_LINES)
        reader = threading.Thread(target=last_lines.extend, args=(process.stderr,), daemon=True)
        reader.start()
        try:
            yield process.stdout
        except BaseException:
            process.kill()
            raise
        code = process.wait()
        reader.join(timeout=5)
    if code:
        said = b"".join(last_lines).decode("utf-8", "replace").strip()
        said = masked(PIPE + said[-_SAID_CHARACTERS:]).removeprefix(PIPE)
        raise DataError(f"{where}: {shown} ended with status {code}" + (f":\n{said}" if said else ""))
