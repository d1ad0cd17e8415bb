"""mosaicml-streaming: its MDS shards, its default shuffle, its own loader."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

from tests.bench.data.loaders.training import Collate, as_sample, decode_pillow, resize_pillow
from tests.bench.data.task import BATCH_SIZE, SEED, Task

SETTINGS = (
    "MDS shards written by its `MDSWriter` (`jpg: bytes`, `json: str`, 64 MiB shards), local; `shuffle=True` with its "
    "default algorithm and block size; Pillow in `__getitem__` (what its `jpeg` encoding does); `StreamingDataLoader`"
)
FORM = "mds"  # folder of what it reads
RESUME = "its own state (`load_state_dict`)"


class _Pictures(StreamingDataset):
    def __getitem__(self, at: int) -> Any:
        sample = super().__getitem__(at)
        return resize_pillow(decode_pillow(sample["jpg"]))


class _Training(StreamingDataset):
    def __getitem__(self, at: int) -> Any:
        sample = super().__getitem__(at)
        return as_sample(decode_pillow(sample["jpg"]), sample["json"])


def prepare(task: Task) -> None:
    """Write MDS shards."""
    if (_folder(task) / "index.json").is_file():
        return
    writer = MDSWriter(out=str(_folder(task)), columns={"jpg": "bytes", "json": "str"}, size_limit=1 << 26)
    with writer:
        for tar in task.tars:
            with tarfile.open(tar) as shard:
                members = {member.name: shard.extractfile(member).read() for member in shard}  # type: ignore[union-attr]
            for name in sorted(members):
                if name.endswith(".jpg"):
                    writer.write({"jpg": members[name], "json": members[name[:-3] + "json"].decode()})


def raw(task: Task) -> Iterator[int]:
    """Columns as bytes."""
    dataset = _open(StreamingDataset, task)
    while True:
        for sample in dataset:
            yield len(sample["jpg"]) + len(sample["json"])


def decoded(task: Task) -> Iterator[Any]:
    """Pillow."""
    dataset = _open(_Pictures, task)
    while True:
        yield from dataset


def batches(task: Task) -> Iterator[Any]:
    """Batches of the processor."""
    loader = StreamingDataLoader(
        _open(_Training, task), BATCH_SIZE, collate_fn=Collate(task.processor), num_workers=task.num_workers
    )
    if task.start:
        state = loader.dataset.state_dict(task.start, from_beginning=True)
        state["epoch"] = 0
        state["sample_in_epoch"] = task.start
        loader.load_state_dict({**state, "num_workers": task.num_workers, "batch_size": BATCH_SIZE})
    while True:
        yield from loader


def _open(kind: type[StreamingDataset], task: Task) -> StreamingDataset:
    clean_stale_shared_memory()  # what a process that was stopped has left
    return kind(local=str(_folder(task)), shuffle=True, shuffle_seed=SEED, batch_size=BATCH_SIZE)


def _folder(task: Task) -> Path:
    return task.folder / "mds"
