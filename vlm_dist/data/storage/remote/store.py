"""One interface to web servers and object stores, through fsspec."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from vlm_dist.data.storage.remote.urls import scheme_of, shown
from vlm_dist.errors import DataError

#: Scheme -> the extra of this package that reads it.
_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}


@dataclass(frozen=True, slots=True)
class RemoteObject:
    """What a server says of an object.

    Attributes:
        num_bytes: None where it does not say.
        version: its ETag, else the time of its last change; empty where it says neither.
    """

    num_bytes: int | None
    version: str


class RangeNotHonouredError(Exception):
    """The server gives whole objects only."""


class RemoteStore(Protocol):
    """Requests to one kind of server; retried until they succeed or it is clear that they will not."""

    def describe(self, url: str) -> RemoteObject | None:
        """Ask for size and version; None where there is no such object.

        Raises:
            DataError: access is denied, or the server fails.
        """

    def list(self, url: str) -> dict[str, RemoteObject] | None:
        """List the objects that a directory or a glob means, sorted; None where a server cannot list."""

    def read(self, url: str, start: int, stop: int, num_bytes: int) -> bytes:
        """Read a range of bytes, all of it, of an object of `num_bytes`.

        Raises:
            RangeNotHonouredError: the server gives whole objects only.
            DataError: there is no such object, it has another size, access is denied, or the server fails.
        """

    def read_whole(self, url: str) -> bytes | None:
        """Read a small object; None where there is none."""

    def download(self, url: str, expected: RemoteObject, descriptor: int, on_bytes: Callable[[int], None]) -> int:
        """Write an object to the start of an open file.

        Args:
            url: of the object.
            expected: what it should be, as far as that is known.
            descriptor: of the file.
            on_bytes: called with the number of bytes that have been written so far; may raise to end it.

        Returns:
            Its size in bytes.

        Raises:
            DataError: it is not what is expected, access is denied, or the server fails.
        """


_stores: dict[tuple[int, str], RemoteStore] = {}


def store_for(url: str) -> RemoteStore:
    """Return this process's store for a URL; connections and event loops are never carried into a child.

    Raises:
        DataError: the scheme is unknown, or the package that reads it is not installed.
    """
    scheme = scheme_of(url)
    extra = _EXTRAS.get(scheme)
    if extra is None:
        raise DataError(f"{scheme}:// is not known; shards are read from local paths and {', '.join(_EXTRAS)}")
    key = (os.getpid(), extra)
    store = _stores.get(key)
    if store is None:
        try:
            store = _make_store(extra)
        except ImportError as error:
            raise DataError(
                f"{scheme}:// needs a package that is not installed ({error.name}): pip install 'vlm-dist[{extra}]'"
            ) from error
        _stores[key] = store
    return store


def _make_store(extra: str) -> RemoteStore:
    if extra == "http":
        from vlm_dist.data.storage.remote.http_store import HttpStore

        return HttpStore()
    from vlm_dist.data.storage.remote.bucket_store import BucketStore

    return BucketStore({"s3": "s3", "gcs": "gs"}[extra])


def check_known(urls: Sequence[str]) -> None:
    """Refuse URLs that cannot be read, before anything is asked for.

    Raises:
        DataError: a scheme is unknown or needs a package; or a bucket is given a user and a password.
    """
    for url in urls:
        scheme = scheme_of(url)
        if scheme not in ("http", "https") and "@" in urlsplit(url).netloc:
            raise DataError(
                f"{shown(url)}: {scheme}:// takes no user and password in the path; this machine's own credentials are "
                "used (docs/data-remote.md): take what stands before the @ out of it"
            )
    for scheme in {scheme_of(url): url for url in urls}.values():
        store_for(scheme)
