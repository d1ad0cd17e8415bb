"""Shards, and sources that read them over the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.storage.servers import Faults, faulty_server
from vlm_dist.data.shards.writer import ShardWriter
from vlm_dist.data.sources import open_source
from vlm_dist.data.storage.remote import retries
from vlm_dist.data.storage.shard_storage import CacheSettings
from vlm_dist.data.types import Source

NUM_SHARDS, ROWS = 6, 8
PICTURE_BYTES = 20_000


def picture(number: int) -> bytes:
    return bytes([number % 251]) * PICTURE_BYTES


def write_shards(folder: Path, num_shards: int = NUM_SHARDS) -> Path:
    """Shards `train-000000.tar` … of 8 samples and 170 KB each."""
    with ShardWriter(folder, prefix="train", max_samples=ROWS) as writer:
        for number in range(num_shards * ROWS):
            writer.write({"__key__": f"s{number:04d}", "jpg": picture(number), "json": {"question": f"q{number}"}})
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "data")


@pytest.fixture
def server(shards: Path) -> Iterator[tuple[str, Faults]]:
    with faulty_server(shards) as serving:
        yield serving


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.01)


Opening = Callable[..., Source]


@pytest.fixture
def opening(tmp_path: Path) -> Opening:
    """Opens a source by its path or paths; further arguments are the cache's."""

    def open_it(path: str | list[str], **cache: Any) -> Source:
        settings = CacheSettings(**{"dir": tmp_path / "cache", **cache})
        return open_source(SimpleNamespace(type="tar", path=path, name="x"), tmp_path / "index", cache=settings)

    return open_it


def read_all(source: Source) -> list[Any]:
    return [source.read(row).fields for row in range(len(source))]
