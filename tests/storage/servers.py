"""Real servers on this machine: nginx, an S3 of moto, a web server that fails on demand, and a small Google storage."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.serving import serving
from vlm_dist.distributed.group import free_port


@dataclass
class Faults:
    """What the server does wrong, and what it was asked."""

    statuses: dict[str, list[int]] = field(default_factory=dict)  # file name -> statuses of its next answers
    cuts: dict[str, list[int]] = field(default_factory=dict)  # file name -> where the next answers break off
    honours_ranges: bool = True
    seconds_per_answer: float = 0.0
    seconds_per_chunk: float = 0.0
    requests: list[tuple[str, str]] = field(default_factory=list)  # (file name, Range header)

    def count(self, name: str) -> int:
        return sum(asked == name for asked, _ in self.requests)

    def whole(self) -> Counter[str]:
        """Requests by file that were not for a part in the middle."""
        return Counter(name for name, wanted in self.requests if wanted in ("", "bytes=0-"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    faults: Faults
    folder: Path

    def log_message(self, *arguments: object) -> None:
        pass

    def find(self) -> Path | None:
        path = self.folder / unquote(urlsplit(self.path).path).lstrip("/")
        return path if path.is_file() else None

    def do_GET(self) -> None:
        path = self.find()
        name = Path(urlsplit(self.path).path).name
        wanted = self.headers.get("Range", "")
        self.faults.requests.append((name, wanted))
        time.sleep(self.faults.seconds_per_answer)
        status = self.faults.statuses[name].pop(0) if self.faults.statuses.get(name) else 200
        if status == 200 and path is None:
            status = 404
        if status != 200:
            self.reply(status, b"no", {"Retry-After": "0"})
            return
        assert path is not None
        self.give(path.read_bytes(), wanted, self.faults.cuts.get(name))

    def give(self, data: bytes, wanted: str, cuts: list[int] | None = None) -> None:
        match = re.match(r"bytes=(\d+)-(\d*)", wanted)
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}
        status, body = 200, data
        if match and self.faults.honours_ranges:
            start = int(match.group(1))
            stop = min(int(match.group(2)) + 1 if match.group(2) else len(data), len(data))
            if start >= len(data):
                self.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            status, body = 206, data[start:stop]
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self.reply(status, body, headers, cuts.pop(0) if cuts else None)

    def reply(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            body = body if cut is None else body[:cut]
            for start in range(0, len(body), 16384):
                self.wfile.write(body[start : start + 16384])
                time.sleep(self.faults.seconds_per_chunk)
        except (BrokenPipeError, ConnectionResetError):
            return
        if cut is not None:
            self.close_connection = True


@contextmanager
def faulty_server(folder: Path) -> Iterator[tuple[str, Faults]]:
    """A web server of a directory that does what its `Faults` say; yields its URL without a slash at the end."""
    faults = Faults()
    handler = type("Handler", (_Handler,), {"faults": faults, "folder": folder})
    with serving(handler) as address:
        yield f"http://{address}", faults


@contextmanager
def google_storage(folder: Path) -> Iterator[tuple[str, Faults]]:
    """The part of Google's storage API that reading needs: listing, metadata, ranges; buckets are folders."""
    faults = Faults()

    class Handler(_Handler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            query = parse_qs(parts.query)
            match = re.match(r"^(?:/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?$", parts.path)
            faults.requests.append((parts.path, self.headers.get("Range", "")))
            if match is None:
                self.reply(404, b"{}", {})
                return
            bucket, name = match.group(1), unquote(match.group(2) or "")
            if name:
                path = folder / bucket / name
                if not path.is_file():
                    self.reply(404, b"{}", {})
                elif query.get("alt") == ["media"] or parts.path.startswith("/download"):
                    self.give(path.read_bytes(), self.headers.get("Range", ""))
                else:
                    self.document(self.describe(bucket, path))
                return
            prefix = query.get("prefix", [""])[0]
            files = sorted(path for path in (folder / bucket).rglob("*") if path.is_file())
            items = [self.describe(bucket, path) for path in files]
            self.document({"kind": "storage#objects", "items": [i for i in items if i["name"].startswith(prefix)]})

        def describe(self, bucket: str, path: Path) -> dict[str, Any]:
            data = path.read_bytes()
            return {
                "kind": "storage#object", "bucket": bucket, "name": str(path.relative_to(folder / bucket)),
                "size": str(len(data)), "etag": hashlib.md5(data).hexdigest(), "generation": "1",
                "updated": "2026-01-01T00:00:00.000Z", "timeCreated": "2026-01-01T00:00:00.000Z",
                "mediaLink": f"http://{self.headers['Host']}/download/storage/v1/b/{bucket}/o/{path.name}?alt=media",
            }  # fmt: skip

        def document(self, value: dict[str, Any]) -> None:
            self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    Handler.faults = faults
    with serving(Handler) as address:
        yield f"http://{address}", faults


NGINX = shutil.which("nginx") or ("/usr/sbin/nginx" if Path("/usr/sbin/nginx").exists() else None)


@contextmanager
def nginx(folder: Path, work: Path) -> Iterator[str]:
    """nginx with a directory under /, and the same without ranges under /whole/."""
    assert NGINX is not None
    work.mkdir(parents=True, exist_ok=True)
    port = free_port()
    user = "user root;" if Path("/root").exists() and _is_root() else ""
    (work / "nginx.conf").write_text(
        f"""
        daemon off; {user} worker_processes 1; pid {work}/nginx.pid; error_log {work}/error.log;
        events {{ worker_connections 64; }}
        http {{
            access_log {work}/access.log;
            client_body_temp_path {work}/a; proxy_temp_path {work}/b; fastcgi_temp_path {work}/c;
            uwsgi_temp_path {work}/d; scgi_temp_path {work}/e;
            server {{
                listen 127.0.0.1:{port};
                root {folder};
                location /whole/ {{ alias {folder}/; max_ranges 0; }}
            }}
        }}
        """
    )
    process = subprocess.Popen([NGINX, "-p", str(work), "-c", str(work / "nginx.conf"), "-e", str(work / "error.log")])
    try:
        _wait_for(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=10)


def _is_root() -> bool:
    import os

    return os.getuid() == 0


def _wait_for(port: int) -> None:
    import socket

    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 of moto; yields its endpoint."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()
