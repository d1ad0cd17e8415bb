"""Media behind URLs: fetched with patience and limits, from a real server on this machine."""

import base64
import threading
from collections import Counter
from typing import ClassVar

import pytest

from tests.serving import QuietHandler, serving
from tests.unit.data.building import build, contents, picture, rows, write_lines
from vlm_dist.data.shards.build.bad_records import BadRecord
from vlm_dist.data.shards.build.fetch import Fetcher, shown_url
from vlm_dist.errors import DataError


class Server(QuietHandler):
    asked: ClassVar[Counter] = Counter()

    def get(self):
        path = self.path.split("?")[0]
        self.asked[path] += 1
        if path.startswith("/gone"):
            self.send_error(404)
        elif path.startswith("/busy") and self.asked[path] < 3:
            self.send_error(503)
        elif path.startswith("/slow"):
            threading.Event().wait(1.0)
            self.close_connection = True
        elif path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", "/0.jpg" if "file" not in path else "file:///etc/hostname")
            self.end_headers()
        elif path.startswith("/cut") and self.asked[path] < 2:
            self.answer(picture(0)[:100], len(picture(0)))
            self.close_connection = True
        elif path.startswith("/page"):
            self.answer(b"<!DOCTYPE html><title>Sign in</title>")
        else:
            self.answer(picture(0))


@pytest.fixture
def server():
    Server.asked = Counter()
    with serving(Server) as place:
        yield f"http://{place}"


@pytest.fixture
def fetcher():
    return Fetcher(timeout_seconds=0.3, max_bytes=100_000, wait=lambda seconds: None)


@pytest.mark.parametrize("path", ["0.jpg", "busy.jpg", "moved.jpg", "cut.jpg"])
def test_what_can_be_had_is_had(server, fetcher, path):
    assert fetcher.fetch(f"{server}/{path}") == picture(0)


@pytest.mark.parametrize(
    ("path", "said", "attempts"),
    [
        ("gone.jpg", "the server says 404", 1),
        ("slow.jpg", "4 attempts", 4),
        ("moved-file", "Redirection to url .* is not allowed", 1),
    ],
)
def test_what_cannot_be_had_is_told(server, fetcher, path, said, attempts):
    with pytest.raises(BadRecord, match=said) as caught:
        fetcher.fetch(f"{server}/{path}?signature=secret")
    assert caught.value.bad_class == "fetch"
    assert "secret" not in str(caught.value)
    assert Server.asked[f"/{path}"] == attempts


def test_limits(server, fetcher):
    with pytest.raises(BadRecord, match="more than 100 bytes"):
        Fetcher(1.0, 100).fetch(f"{server}/0.jpg")
    for url in ("file:///etc/hostname", "ftp://127.0.0.1/x.jpg"):
        with pytest.raises(BadRecord, match="is not fetched"):
            fetcher.fetch(url)
    assert shown_url("https://user:word@x.org/a.jpg?sig=1") == "https://x.org/a.jpg"


def test_a_build_from_urls(tmp_path, server):
    inline = "data:image/jpeg;base64," + base64.b64encode(picture(0)).decode()
    urls = [f"{server}/{n}.jpg?size=large" for n in range(6)] + [inline]
    path = write_lines(tmp_path / "in.jsonl", [{"image": url, "question": "q", "answer": "a"} for url in urls])
    build(path, tmp_path / "a", workers=3)
    assert [row["image"] for row in rows(tmp_path / "a")] == [picture(0)] * 7
    build(path, tmp_path / "b", workers=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_bad_urls_stop_a_build_or_are_left_out(tmp_path, server):
    urls = [f"{server}/0.jpg", f"{server}/gone.jpg", f"{server}/page.jpg", "file:///etc/hostname.jpg"]
    path = write_lines(tmp_path / "in.jsonl", [{"image": url, "question": "q", "answer": "a"} for url in urls])
    with pytest.raises(DataError, match=r"in\.jsonl:2: .*404.*--resume"):
        build(path, tmp_path / "a")
    summary = build(path, tmp_path / "b", skip_bad=True)
    assert summary.num_samples == 1
    assert summary.skipped == {"fetch": 2, "bad_media": 1}
