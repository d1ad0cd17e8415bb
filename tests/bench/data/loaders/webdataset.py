"""webdataset: tar shards, `shuffle(1000)`, its own Pillow decoder, its own loader for workers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torchvision.io
import webdataset as wds

from tests.bench.data.loaders.training import Collate, as_sample, resize_pillow
from tests.bench.data.task import BATCH_SIZE, SEED, Task

SETTINGS = (
    "the same tar shards; `WebDataset(shardshuffle=100, detshuffle=True).shuffle(1000)`, `decode('pilrgb')`, batches "
    "by `batched(8)`, workers by `WebLoader`; raw reads without any shuffle, as bytes"
)
FORM = "tar"  # folder of what it reads
RESUME = "no state of its own: the samples before are read and dropped, undecoded"
SHUFFLE = 1000


def prepare(task: Task) -> None:
    """Nothing: it reads the shards as they are."""


def raw(task: Task) -> Iterator[int]:
    """Members as bytes, in the order in which they lie: the shuffle buffer would cost it a tenth and more."""
    for sample in wds.WebDataset(task.tars, shardshuffle=False, empty_check=False).repeat():
        yield len(sample["jpg"]) + len(sample["json"])


def decoded(task: Task) -> Iterator[Any]:
    """Pillow."""
    for sample in _shuffled(task).decode("pilrgb").repeat():
        yield resize_pillow(sample["jpg"])


def batches(task: Task) -> Iterator[Any]:
    """Batches of the processor."""
    shuffled = _shuffled(task).repeat()
    if task.start:
        shuffled = shuffled.compose(lambda samples: itertools.islice(samples, task.start, None))
    samples = shuffled.decode("pilrgb").map(_as_sample)
    return _load(samples, task)


def _shuffled(task: Task) -> Any:
    return wds.WebDataset(task.tars, shardshuffle=100, detshuffle=True, seed=SEED, empty_check=False).shuffle(SHUFFLE)


def _as_sample(sample: dict[str, Any]) -> Any:
    return as_sample(sample["jpg"], sample["json"])


def _load(samples: Any, task: Task) -> Iterator[Any]:
    batched = samples.batched(BATCH_SIZE, collation_fn=Collate(task.processor), partial=False)
    return iter(wds.WebLoader(batched, batch_size=None, num_workers=task.num_workers))


def decode_torchvision(jpeg: bytes) -> Any:
    """Decode with libjpeg-turbo through torchvision: uint8 [3, H, W]."""
    data = torch.frombuffer(bytearray(jpeg), dtype=torch.uint8)
    return torchvision.io.decode_jpeg(data, mode=torchvision.io.ImageReadMode.RGB)
