"""webdataset with a decoder written by hand: torchvision's, whose tensors the processor takes as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.bench.data.loaders import webdataset
from tests.bench.data.loaders.training import as_sample, resize_tensor
from tests.bench.data.task import Task

SETTINGS = "webdataset as above, but decoded by hand with `torchvision.io.decode_jpeg` and resized by torchvision's v2"
FORM = "tar"  # folder of what it reads
RESUME = webdataset.RESUME

prepare = webdataset.prepare
raw = webdataset.raw


def decoded(task: Task) -> Iterator[Any]:
    """Tensors."""
    for sample in webdataset._shuffled(task).repeat():
        yield resize_tensor(webdataset.decode_torchvision(sample["jpg"]))


def batches(task: Task) -> Iterator[Any]:
    """Batches of the processor."""
    return webdataset._load(webdataset._shuffled(task).repeat().map(_as_sample), task)


def _as_sample(sample: dict[str, Any]) -> Any:
    return as_sample(webdataset.decode_torchvision(sample["jpg"]), json.loads(sample["json"]))
