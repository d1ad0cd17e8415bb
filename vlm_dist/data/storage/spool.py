"""Shards that cannot be read by offset where they are: written to a file of this machine once, then like any other.

These are the output of a command (`pipe:COMMAND`, webdataset's notation) and compressed tars. The copies stay in the
cache's directory under `spool/` until somebody deletes them: a command may give something else the next time, and a run
that resumes needs what it had.
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
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from vlm_dist.data.index.tar_headers import TarReader
from vlm_dist.data.storage.find import expand_braces, find_files
from vlm_dist.data.storage.remote.byte_lock import byte_lock
from vlm_dist.data.storage.remote.shard_cache import ShardCache
from vlm_dist.data.storage.remote.urls import digest_of
from vlm_dist.data.storage.shard_storage import COMPRESSED, CacheSettings
from vlm_dist.errors import DataError

PIPE = "pipe:"

_CHUNK_BYTES = 1024 * 1024
_REPORT_BYTES = 5 * 10**9
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_SHOWN_CHARACTERS = 80
_SHOWN_LINES = 5

log = logging.getLogger(__name__)


def spool_shards(where: str, patterns: Sequence[str], settings: CacheSettings) -> list[Path]:
    """Write the output of commands and the content of compressed tars to files; what is there already is kept.

    Args:
        where: names the source in errors.
        patterns: `pipe:` commands and compressed tars, each with braces.
        settings: of the cache, whose limit is that of these files too.

    Returns:
        The files, in the order of the patterns.

    Raises:
        DataError: a command fails, a file is damaged, or they do not fit the cache.
    """
    origins = [origin for pattern in patterns for origin in _expand(where, pattern)]
    folder = ShardCache(settings.dir, settings.max_bytes).directory / "spool"
    folder.mkdir(exist_ok=True)
    paths = [folder / _file_name(origin) for origin in origins]
    for origin, path in zip(origins, paths, strict=True):
        if path.exists():
            continue
        with byte_lock(folder / ".locks", path.name):
            if not path.exists():  # another process was first
                _spool(where, origin, path, settings.max_bytes - _size_of(folder))
    return paths


def _expand(where: str, pattern: str) -> list[str]:
    if pattern.startswith(PIPE):
        return expand_braces(pattern)
    if pattern.endswith(COMPRESSED):
        return [str(path) for path in find_files(where, pattern, COMPRESSED)]
    raise DataError(f"{where}: {pattern} cannot stand in one source with pipes and compressed shards; make it another")


def _file_name(origin: str) -> str:
    if origin.startswith(PIPE):
        return f"pipe-{digest_of(origin)}.tar"
    status = Path(origin).stat()
    stem = next(Path(origin).name.removesuffix(ending) for ending in COMPRESSED if origin.endswith(ending))
    return f"{stem}-{digest_of(f'{Path(origin).resolve()} {status.st_size} {status.st_mtime_ns}')}.tar"


def _spool(where: str, origin: str, path: Path, room: int) -> None:
    shown = origin if len(origin) <= _SHOWN_CHARACTERS else origin[:_SHOWN_CHARACTERS] + "…"
    part = path.with_name(path.name + ".part")
    log.info("%s: writing %s to %s", where, shown, path)
    try:
        with part.open("wb") as target, _open(where, shown, origin) as stream:
            _copy(where, shown, stream, target, room)
            target.flush()
            os.fsync(target.fileno())
        _check_whole(where, shown, part)
        part.replace(path)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{where}: {shown} cannot be written to {path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def _copy(where: str, shown: str, stream: IO[bytes], target: IO[bytes], room: int) -> None:
    written, next_report = 0, _REPORT_BYTES
    while chunk := stream.read(_CHUNK_BYTES):
        written += len(chunk)
        if written > room:
            raise DataError(
                f"{where}: {shown} gives more than the {room / 1e9:.1f} GB that data.cache.max_size leaves for it; "
                "raise that if it ends at all. A stream without an end cannot be read by row, so no run could resume: "
                "write as much of it as you train on into shards (vlm-dist shards build), and read those"
            )
        target.write(chunk)
        if written >= next_report:
            log.info("%s: %.0f GB of %s are written", where, written / 1e9, shown)
            next_report += _REPORT_BYTES


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
        raise DataError(f"{where}: {shown} ended with status {code}" + (f":\n{said}" if said else ""))


def _size_of(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in folder.iterdir() if entry.suffix == ".tar")
