"""Object stores, through s3fs and gcsfs; credentials come from where these look for them, never from a config file."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec

from vlm_dist.config.masking import masked
from vlm_dist.data.storage.remote.retries import TransientError, with_backoff
from vlm_dist.data.storage.remote.store import RemoteObject
from vlm_dist.data.storage.remote.urls import shown
from vlm_dist.errors import DataError

_CHUNK_BYTES = 16 * 1024 * 1024
_MAGIC = ("*", "?", "[")

_T = TypeVar("_T")


class BucketStore:
    """Reads objects of one kind of store.

    Args:
        scheme: `s3` or `gs`.

    Raises:
        ImportError: s3fs or gcsfs is not installed.
    """

    def __init__(self, scheme: str) -> None:
        self._files: Any = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)

    def describe(self, url: str) -> RemoteObject | None:
        """Ask for size and version; None where there is no such object."""
        facts = self._ask(url, lambda: self._files.info(url, refresh=True), missing=True)
        return None if facts is None or facts.get("type") == "directory" else _object_of(facts)

    def list(self, url: str) -> dict[str, RemoteObject] | None:
        """List the objects that a directory or a glob means, sorted."""
        scheme = url.partition("://")[0]

        def find() -> dict[str, Any]:
            if any(letter in url for letter in _MAGIC):
                return dict(self._files.glob(url, detail=True))
            return dict(self._files.find(url.rstrip("/") + "/", maxdepth=1, detail=True))

        found = self._ask(url, find, missing=True) or {}
        return {
            f"{scheme}://{name}": _object_of(facts)
            for name, facts in sorted(found.items())
            if facts.get("type") != "directory"
        }

    def read(self, url: str, start: int, stop: int, num_bytes: int) -> bytes:
        """Read a range of bytes, all of it, of an object of `num_bytes`."""

        def take() -> bytes:
            data: bytes = self._files.cat_file(url, start=start, end=stop)
            if len(data) != stop - start:
                self._compare(url, RemoteObject(num_bytes, ""))
                raise TransientError(f"{len(data)} of {stop - start} bytes came")
            return data

        data = self._ask(url, take)
        assert data is not None
        return data

    def read_whole(self, url: str) -> bytes | None:
        """Read a small object; None where there is none."""
        data: bytes | None = self._ask(url, lambda: self._files.cat_file(url), missing=True)
        return data

    def download(self, url: str, expected: RemoteObject, descriptor: int, on_bytes: Callable[[int], None]) -> int:
        """Write an object to the start of an open file, part by part."""
        before = self._compare(url, expected)
        assert before.num_bytes is not None
        for position in range(0, before.num_bytes, _CHUNK_BYTES):
            stop = min(position + _CHUNK_BYTES, before.num_bytes)
            os.pwrite(descriptor, self.read(url, position, stop, before.num_bytes), position)
            on_bytes(stop)
        self._compare(url, before)  # the parts are of one object
        return before.num_bytes

    def _compare(self, url: str, expected: RemoteObject) -> RemoteObject:
        found = self.describe(url)
        if found is None or found.num_bytes is None:
            raise DataError(f"{shown(url)}: there is no such object")
        for what, now, before in (
            ("size", found.num_bytes, expected.num_bytes),
            ("version", found.version, expected.version),
        ):
            if now and before and now != before:
                raise DataError(
                    f"{shown(url)}: the shard has changed since it was indexed ({what} {now}, {before} was expected); "
                    "put the old one back, or index it again (vlm-dist shards index) and start a new run"
                )
        return found

    def _ask(self, url: str, action: Callable[[], _T], missing: bool = False) -> _T | None:
        def attempt() -> _T | None:
            try:
                return action()
            except FileNotFoundError as error:
                if missing:
                    return None
                raise DataError(f"{shown(url)}: there is no such object") from error
            except PermissionError as error:
                raise DataError(
                    f"{shown(url)}: access is denied ({masked(str(error))}); check the credentials of this machine"
                ) from error
            except (DataError, TransientError):
                raise
            except Exception as error:
                if type(error).__name__ in _NO_CREDENTIALS:
                    raise DataError(
                        f"{shown(url)}: there are no credentials on this machine ({masked(str(error))}); set them up, "
                        "or for a public bucket ask anonymously (FSSPEC_S3_ANON=true, FSSPEC_GS_TOKEN=anon)"
                    ) from error
                said = f"{type(error).__name__}: {masked(str(error))}"
                if not _may_pass(error):
                    raise DataError(f"{shown(url)}: the store answers {said}") from error
                raise TransientError(said) from error

        return with_backoff(shown(url), attempt)


_NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "DefaultCredentialsError",
    "CredentialRetrievalError",
)
_PROGRAM_ERRORS = (TypeError, ValueError, AttributeError, KeyError, NotImplementedError, ImportError)


def _may_pass(error: Exception) -> bool:
    """Whether a failure of the store or the network may pass; s3fs and gcsfs have no common word for it."""
    if type(error).__name__ == "ParamValidationError":  # botocore's: the request itself is wrong
        return False
    return not isinstance(error, _PROGRAM_ERRORS) and not (isinstance(error, OSError) and error.errno == 22)


def _object_of(facts: dict[str, Any]) -> RemoteObject:
    version = facts.get("ETag") or facts.get("etag") or facts.get("generation") or facts.get("LastModified") or ""
    size = facts.get("size")
    return RemoteObject(None if size is None else int(size), str(version).strip('"'))
