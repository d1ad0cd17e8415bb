"""Fetches media by URL: time-outs, a few attempts, a limit on the size; no secret of a URL is shown."""

from __future__ import annotations

import base64
import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from vlm_dist.data.shards.build.bad_records import BadRecord
from vlm_dist.data.storage.remote.store import store_for
from vlm_dist.data.storage.remote.urls import shown
from vlm_dist.errors import DataError

_WEB = ("http", "https")
_STORES = ("s3", "gs", "gcs")
_HUB = "hf"
_ATTEMPTS = 4
_CHUNK_BYTES = 1024 * 1024
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_MAX_WAIT_SECONDS = 30.0


def is_url(value: str) -> bool:
    """Whether a media value names no file."""
    return "://" in value or value.startswith("data:")


def shown_url(url: str) -> str:
    """Write a URL without user, password and query, which may hold a signature."""
    if url.startswith("data:"):
        return url[:30] + "…"
    return shown(url)


@dataclass(frozen=True)
class Fetcher:
    """Fetches one URL at a time; many threads may use one fetcher.

    The web is read by the standard library: pictures are small, and no extra of this package has to be installed.

    Args:
        timeout_seconds: of an attempt that makes no progress.
        max_bytes: a larger answer is refused.
        wait: sleeps between attempts.
    """

    timeout_seconds: float
    max_bytes: int
    wait: Callable[[float], None] = time.sleep

    def fetch(self, url: str) -> bytes:
        """Fetch a URL (http, https, object storage) or decode a `data:` URL.

        Raises:
            BadRecord: ("fetch") it cannot be had; ("bad_media") it is too large.
            DataError: what reads this kind of storage is not installed.
        """
        if url.startswith("data:"):
            return _decode_data_url(url)
        scheme = url.split("://", 1)[0].lower()
        if scheme in _STORES:
            return self._from_store(url)
        if scheme not in (*_WEB, _HUB):
            known = ", ".join((*_WEB, *_STORES, _HUB))
            raise BadRecord("fetch", f"{shown_url(url)}: {scheme}:// is not fetched, only {known}")
        for attempt in range(_ATTEMPTS):
            try:
                return self._from_web(url) if scheme in _WEB else self._from_hub(url)
            except urllib.error.HTTPError as error:
                if error.code not in _TRY_AGAIN or attempt == _ATTEMPTS - 1:
                    raise BadRecord(
                        "fetch", f"{shown_url(url)}: the server says {error.code} {error.reason}"
                    ) from error
                pause = _wanted_pause(error.headers)
            except FileNotFoundError as error:
                raise BadRecord("fetch", f"{shown_url(url)}: there is no such object") from error
            except (OSError, http.client.HTTPException) as error:
                if attempt == _ATTEMPTS - 1:
                    reason = getattr(error, "reason", error)
                    raise BadRecord(
                        "fetch", f"{shown_url(url)}: {reason or type(error).__name__}, {_ATTEMPTS} attempts"
                    ) from error
                pause = 0.0
            self.wait(min(max(pause, 0.5 * 2**attempt), _MAX_WAIT_SECONDS))
        raise AssertionError("unreachable")

    def _from_web(self, url: str) -> bytes:
        request = urllib.request.Request(url, headers={"User-Agent": "vlm-dist shards build"})  # noqa: S310 - http(s) only
        with urllib.request.urlopen(request, timeout=self.timeout_seconds) as answer:  # noqa: S310
            length = answer.headers.get("Content-Length")
            data = self._read(url, answer)
            if length is not None and length.isdigit() and len(data) < int(length):
                raise OSError(f"{len(data)} of {length} bytes came")
            return data

    def _from_hub(self, url: str) -> bytes:
        import fsspec

        with fsspec.open(url, "rb") as stream:
            return self._read(url, stream)

    def _from_store(self, url: str) -> bytes:
        store = store_for(url)
        try:
            found = store.describe(url)
            if found is not None and (found.num_bytes or 0) > self.max_bytes:
                raise self._too_large(url)
            data = store.read_whole(url) if found is not None else None
        except DataError as error:
            raise BadRecord("fetch", str(error)) from error
        if data is None:
            raise BadRecord("fetch", f"{shown_url(url)}: there is no such object")
        return data

    def _read(self, url: str, stream: IO[bytes] | Any) -> bytes:
        data = bytearray()
        while chunk := stream.read(_CHUNK_BYTES):
            data += chunk
            if len(data) > self.max_bytes:
                raise self._too_large(url)
        return bytes(data)

    def _too_large(self, url: str) -> BadRecord:
        return BadRecord("bad_media", f"{shown_url(url)}: more than {self.max_bytes} bytes (--max-media-size)")


def _decode_data_url(url: str) -> bytes:
    head, _, body = url.partition(",")
    try:
        if head.endswith(";base64"):
            return base64.b64decode(body, validate=True)
        return urllib.parse.unquote_to_bytes(body)
    except ValueError as error:
        raise BadRecord("bad_media", f"a data: URL that is not base64: {error}") from error


def _wanted_pause(headers: Any) -> float:
    value = str(headers.get("Retry-After") or "") if headers is not None else ""
    return float(value) if value.isdigit() else 0.0
