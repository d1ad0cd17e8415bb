"""Hugging Face datasets, streaming: Parquet files, a shuffle buffer, a torch DataLoader."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, Value, config, load_dataset
from torch.utils.data import DataLoader

from tests.bench.data.loaders.training import Collate, as_sample, resize_pillow
from tests.bench.data.task import BATCH_SIZE, SEED, Task

SETTINGS = (
    "Parquet, one file per shard, row groups of 100 as `push_to_hub` writes them (faster than its tar reader here); "
    "`streaming=True`, `.shuffle(buffer_size=1000)`, its `Image()` feature (Pillow), torch's DataLoader; its pause of "
    "5 s at the end of an epoch is switched off"
)
FORM = "parquet"  # folder of what it reads
RESUME = "its own state (`load_state_dict`); what its shuffle buffer held is lost, as it documents"
SHUFFLE = 1000

# it sleeps 5 seconds at the end of every pass (apache/arrow#45214): most of a small epoch, nothing of a real one
config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0


def prepare(task: Task) -> None:
    """Write one Parquet file per shard."""
    folder = _folder(task)
    if (folder / "made").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("jpg", image), ("json", pa.string())])
    for tar in task.tars:
        with tarfile.open(tar) as shard:
            members = {member.name: shard.extractfile(member).read() for member in shard}  # type: ignore[union-attr]
        names = sorted(name for name in members if name.endswith(".jpg"))
        rows = {
            "jpg": [{"bytes": members[name], "path": None} for name in names],
            "json": [members[name[:-3] + "json"].decode() for name in names],
        }
        path = folder / f"{Path(tar).stem}.parquet"
        pq.write_table(pa.table(rows, schema=schema), path, row_group_size=100, compression="none")
    (folder / "made").touch()


def raw(task: Task) -> Iterator[int]:
    """Columns as bytes."""
    dataset = _shuffled(task, decode=False)
    while True:
        for sample in dataset:
            yield len(sample["jpg"]["bytes"]) + len(sample["json"])


def decoded(task: Task) -> Iterator[Any]:
    """Pillow."""
    dataset = _shuffled(task, decode=True)
    while True:
        for sample in dataset:
            yield resize_pillow(sample["jpg"])


def batches(task: Task) -> Iterator[Any]:
    """Batches of the processor."""
    dataset = _shuffled(task, decode=True)
    if task.start:
        dataset.load_state_dict(json.loads(_state(task).read_text()))
    collate = Collate(task.processor)
    loader = DataLoader(
        dataset, BATCH_SIZE, collate_fn=_Training(collate), num_workers=task.num_workers, drop_last=True
    )
    yield from loader
    # near the end of an epoch nothing is left behind a restored state: what the shuffle buffer had read is lost
    again = DataLoader(
        _shuffled(task, decode=True),
        BATCH_SIZE,
        collate_fn=_Training(collate),
        num_workers=task.num_workers,
        drop_last=True,
    )
    while True:
        yield from again


def save_state(task: Task) -> None:
    """Read up to `task.start` and keep the data set's state."""
    if _state(task).is_file():
        return
    dataset = _shuffled(task, decode=False)
    for number, _ in enumerate(dataset, start=1):
        if number >= task.start:
            break
    _state(task).write_text(json.dumps(dataset.state_dict()))


class _Training:
    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def __call__(self, samples: list[dict[str, Any]]) -> Any:
        return self._collate([as_sample(sample["jpg"], sample["json"]) for sample in samples])


def _shuffled(task: Task, decode: bool) -> Any:
    features = Features({"jpg": Image(mode="RGB", decode=decode), "json": Value("string")})
    files = sorted(str(path) for path in _folder(task).glob("*.parquet"))
    dataset = load_dataset("parquet", data_files=files, split="train", streaming=True, features=features)
    return dataset.shuffle(seed=SEED, buffer_size=SHUFFLE)


def _folder(task: Task) -> Path:
    return task.folder / "parquet"


def _state(task: Task) -> Path:
    return _folder(task) / f"state-{task.start}.json"
