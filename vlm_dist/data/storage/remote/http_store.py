"""Web servers, over the connections of fsspec's HTTP file system."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import fsspec
import yarl
from fsspec.asyn import sync

from vlm_dist.data.storage.remote.retries import TransientError, with_backoff
from vlm_dist.data.storage.remote.store import RangeNotHonouredError, RemoteObject
from vlm_dist.data.storage.remote.urls import shown
from vlm_dist.errors import DataError

_CONNECT_SECONDS = 20.0
_SILENCE_SECONDS = 60.0  # without a byte
_CHUNK_BYTES = 1024 * 1024
_MAX_WHOLE_BYTES = 256 * 1024 * 1024  # of manifests and indexes
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_TRANSIENT = (aiohttp.ClientError, asyncio.TimeoutError, ConnectionError)

_T = TypeVar("_T")


class HttpStore:
    """Reads from web servers. Knows of each host, after its first answer, whether it honours ranges."""

    def __init__(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
        self._files: Any = fsspec.filesystem(
            "http",
            skip_instance_cache=True,
            client_kwargs={"timeout": timeout, "trust_env": True, "headers": {"Accept-Encoding": "identity"}},
        )
        self._honours: dict[str, bool] = {}
        self._lock = threading.Lock()

    def describe(self, url: str) -> RemoteObject | None:
        """Ask for size and version, by a range of one byte: not every server answers HEAD."""

        async def ask(response: aiohttp.ClientResponse) -> RemoteObject:
            self._note_range(url, response)
            whole = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
            size = whole.group(3) if response.status == 206 and whole else response.headers.get("Content-Length")
            return RemoteObject(int(size) if size and size.isdigit() else None, _version(response))

        return self._ask(url, {"Range": "bytes=0-0"}, ask, missing=True)

    def list(self, url: str) -> dict[str, RemoteObject] | None:
        """Web servers have no common form of a listing."""
        return None

    def read(self, url: str, start: int, stop: int, num_bytes: int) -> bytes:
        """Read a range of bytes, all of it, of an object of `num_bytes`."""
        if self._honours.get(urlsplit(url).netloc) is False:
            raise RangeNotHonouredError

        async def take(response: aiohttp.ClientResponse) -> bytes | None:
            self._note_range(url, response)
            if response.status != 206:
                return None
            if _whole_size(response) not in (None, num_bytes):
                raise _changed(url, f"{_whole_size(response)} bytes, {num_bytes} were indexed")
            data = await response.read()
            if len(data) != stop - start:
                raise TransientError(f"{len(data)} of {stop - start} bytes came")
            return data

        data = self._ask(url, {"Range": f"bytes={start}-{stop - 1}"}, take)
        if data is None:
            raise RangeNotHonouredError
        return data

    def read_whole(self, url: str) -> bytes | None:
        """Read a small object; None where there is none."""

        async def take(response: aiohttp.ClientResponse) -> bytes:
            data = bytearray()
            async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
                data += chunk
                if len(data) > _MAX_WHOLE_BYTES:
                    raise DataError(f"{shown(url)}: more than {_MAX_WHOLE_BYTES} bytes, which is no index or manifest")
            return bytes(data)

        return self._ask(url, {}, take, missing=True)

    def download(self, url: str, expected: RemoteObject, descriptor: int, on_bytes: Callable[[int], None]) -> int:
        """Write an object to the start of an open file; goes on where a connection broke, if the server lets it."""
        position, version = 0, expected.version

        async def take(response: aiohttp.ClientResponse) -> int:
            nonlocal position, version
            size = _whole_size(response)
            if response.status == 206:
                match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
                if match is None or int(match.group(1)) != position:
                    raise TransientError("the answer is not the range that was asked for")
            else:
                position = 0
            if expected.num_bytes is not None and size is not None and size != expected.num_bytes:
                raise _changed(url, f"{size} bytes, {expected.num_bytes} were indexed")
            if version and _version(response) and _version(response) != version:
                raise _changed(url, f"it is version {_version(response)}, {version} was expected")
            version = version or _version(response)
            self._note_range(url, response)
            async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
                os.pwrite(descriptor, chunk, position)
                position += len(chunk)
                on_bytes(position)
            if size is not None and position != size:
                raise TransientError(f"the answer ended after {position} of {size} bytes")
            return position

        def attempt_headers() -> dict[str, str]:
            return {"Range": f"bytes={position}-"} if position or self._honours.get(urlsplit(url).netloc) else {}

        size = self._ask(url, attempt_headers, take, progress=lambda: position)
        assert size is not None
        if expected.num_bytes is not None and size != expected.num_bytes:
            raise _changed(url, f"{size} bytes, {expected.num_bytes} were indexed")
        return size

    def _ask(
        self,
        url: str,
        headers: dict[str, str] | Callable[[], dict[str, str]],
        use: Callable[[aiohttp.ClientResponse], Awaitable[_T]],
        missing: bool = False,
        progress: Callable[[], int] = lambda: 0,
    ) -> _T | None:
        """Send a GET request and use its answer; None for a missing object, where `missing` allows that."""

        async def request() -> _T | None:
            session = await self._files.set_session()
            sent = headers() if callable(headers) else headers
            try:
                async with session.get(yarl.URL(url, encoded="%" in url), headers=sent) as response:
                    if response.status in (404, 410) and missing:
                        return None
                    _check_status(url, response)
                    return await use(response)
            except _TRANSIENT as error:
                raise TransientError(_describe(error)) from error

        def attempt() -> _T | None:
            answer: _T | None = sync(self._files.loop, request)
            return answer

        return with_backoff(shown(url), attempt, progress)

    def _note_range(self, url: str, response: aiohttp.ClientResponse) -> None:
        if "Range" not in response.request_info.headers:
            return
        good = response.status == 206 and _CONTENT_RANGE.match(response.headers.get("Content-Range", "")) is not None
        with self._lock:
            self._honours.setdefault(urlsplit(url).netloc, good)


def _check_status(url: str, response: aiohttp.ClientResponse) -> None:
    status = response.status
    if status in (200, 206):
        return
    if status in (408, 425, 429) or status >= 500:
        raise TransientError(f"the server answers {status} {response.reason}", _retry_after(response))
    if status in (401, 403):
        raise DataError(
            f"{shown(url)}: the server refuses access ({status}); look at the URL's signature, or into ~/.netrc"
        )
    if status in (404, 410):
        raise DataError(f"{shown(url)}: the server has no such file ({status})")
    if status == 416:
        raise _changed(url, "it is shorter than what was indexed")
    raise DataError(f"{shown(url)}: the server answers {status} {response.reason}")


def _changed(url: str, why: str) -> DataError:
    return DataError(
        f"{shown(url)}: the shard has changed since it was indexed ({why}); put the old one back, or index it again "
        "(vlm-dist shards index) and start a new run"
    )


def _version(response: aiohttp.ClientResponse) -> str:
    return str(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")


def _whole_size(response: aiohttp.ClientResponse) -> int | None:
    match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    text = match.group(3) if response.status == 206 and match else response.headers.get("Content-Length", "")
    return int(text) if text.isdigit() else None


def _retry_after(response: aiohttp.ClientResponse) -> float:
    value = response.headers.get("Retry-After", "")
    if value.isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
        return max(0.0, (moment - parsedate_to_datetime(response.headers["Date"])).total_seconds())
    except (ValueError, TypeError, KeyError):
        return 0.0


def _describe(error: BaseException) -> str:
    """Describe an error without the URL that it may hold."""
    text = re.sub(r"\w+://\S+", "<url>", str(error))
    return f"{type(error).__name__}{': ' + text if text else ''}"
