"""Where converted checkpoints are kept, and how each is made exactly once.

A converted checkpoint is a directory `<name>-<digest>` under `$VLM_DIST_CACHE/converted` (default
`~/.cache/vlm_dist/converted`). It is written beside its final name and renamed when it is whole: what has the name is
complete. The digest covers the source files and the version of the converter, so a changed source gets a new directory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from vlm_dist.errors import ModelError
from vlm_dist.model.conversion.lease import Lease

logger = logging.getLogger(__name__)

#: Below this size a file counts by its content, above by what the file system or the hub cache says of it.
_SMALL_BYTES = 4 << 20
_ABANDONED_SECONDS = 24 * 3600.0


def cache_root() -> Path:
    """`$VLM_DIST_CACHE/converted`, else below `$XDG_CACHE_HOME` or `~/.cache`."""
    given = os.environ.get("VLM_DIST_CACHE")
    if given:
        return Path(given).expanduser() / "converted"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vlm_dist" / "converted"


def identity(files: Iterable[Path], version: str) -> str:
    """A digest of source files and of what is done to them, without reading large files.

    A small file counts by its content; a file of a hub cache by the name of its blob, which is the digest of its
    content; any other by size and time of change.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(version.encode())
    for file in sorted(files, key=lambda file: file.name):
        status = file.stat()
        if status.st_size <= _SMALL_BYTES:
            mark = hashlib.sha256(file.read_bytes()).hexdigest()
        elif file.is_symlink() and file.resolve().parent.name == "blobs":
            mark = file.resolve().name
        else:
            mark = f"{status.st_size} {status.st_mtime_ns}"
        digest.update(f"{file.name}\n{mark}\n".encode())
    return digest.hexdigest()[:16]


def make_once(name: str, num_bytes: int, make: Callable[[Path, Callable[[], None]], None]) -> Path:
    """The directory of this name in the cache; made now if it is not there.

    Several processes may call this at once: one makes it, the others wait for it. What a killed process has left is
    removed.

    Args:
        name: of the directory.
        num_bytes: how much `make` will write, about.
        make: writes into the empty directory it is given; calls the function it is given as it makes progress.

    Raises:
        ModelError: there is no room, or no permission to write.
    """
    target = cache_root() / name
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lease = Lease.acquire(target, f"converting {name}")
        if lease is None:
            return target
        try:
            _remove_leftovers(target)
            _check_room(target.parent, num_bytes)
            part = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.part")
            part.mkdir()
            try:
                make(part, lease.touch)
                _publish(part, target)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        finally:
            lease.release()
    except OSError as error:
        raise ModelError(
            f"cannot write the converted checkpoint {target}: {error}. It needs {num_bytes / 1e9:.1f} GB; set "
            "VLM_DIST_CACHE to a directory with room, on a disk that all nodes see where there is one."
        ) from error
    return target


def _publish(part: Path, target: Path) -> None:
    for path in (*part.iterdir(), part):  # a machine that loses its power must not leave a whole name on half a file
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    try:
        part.rename(target)
    except OSError:
        if not target.exists():
            raise
        logger.info("%s was made by another process at the same time; its result is used", target)


def _check_room(directory: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise OSError(f"only {free / 1e9:.1f} GB are free in {directory}")


def _remove_leftovers(target: Path) -> None:
    """Remove what processes have left that died in the midst of it."""
    for part in target.parent.glob(f".{target.name}.*.part"):
        host, process = part.name.removeprefix(f".{target.name}.").rsplit(".", 3)[:2]
        try:
            age = time.time() - part.stat().st_mtime
            if host == socket.gethostname() and process != str(os.getpid()):
                os.kill(int(process), 0)
            if age < _ABANDONED_SECONDS:
                continue
        except ProcessLookupError:
            pass  # its maker is gone
        except (FileNotFoundError, PermissionError, ValueError):
            continue
        shutil.rmtree(part, ignore_errors=True)
