"""megatron-energon: its prepared tar shards, a task encoder with a cooker, its savable loader."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    SampleDecoder,
    WorkerConfig,
    basic_sample_keys,
    get_savable_loader,
    get_train_dataset,
    stateless,
)

from tests.bench.data.loaders.training import Collate, as_sample, resize_pillow
from tests.bench.data.task import BATCH_SIZE, Task

SETTINGS = (
    "the same tar shards after `energon prepare` (CrudeWebdataset, a cooker); `shuffle_buffer_size=100`, "
    "`max_samples_per_sequence=100` as its documentation has them, `SampleDecoder(image_decode='pilrgb')`, savable "
    "loader"
)
FORM = "energon"  # folder of what it reads
RESUME = "its own state, saved by a loader that has read so far and given to `restore_state_rank`"


@dataclass(slots=True, kw_only=True)
class _Sample(Sample):
    image: Any
    text: Any


@stateless
def _cook(sample: dict[str, Any]) -> _Sample:
    return _Sample(**basic_sample_keys(sample), image=sample["jpg"], text=sample["json"])


class _Raw(DefaultTaskEncoder):
    cookers = [Cooker(_cook)]  # noqa: RUF012 - its interface
    decoder = None

    def batch(self, samples: list[Any]) -> Any:
        return samples


class _Pictures(_Raw):
    decoder = SampleDecoder(image_decode="pilrgb")


class _Training(_Pictures):
    def __init__(self, processor: str) -> None:
        super().__init__()
        self._collate = Collate(processor)

    @stateless
    def batch(self, samples: list[Any]) -> Any:
        return self._collate([as_sample(sample.image, sample.text) for sample in samples])

    def encode_batch(self, batch: Any) -> Any:
        return batch


def prepare(task: Task) -> None:
    """Link the shards into a folder of its own, and let its tool index them."""
    folder = _folder(task)
    if (folder / ".nv-meta" / "dataset.yaml").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for tar in task.tars:
        os.link(tar, folder / Path(tar).name)
    subprocess.run(
        [
            *(str(Path(sys.executable).with_name("energon")), "prepare", str(folder), "--non-interactive"),
            *("--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--num-workers", "2", "--no-progress"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def raw(task: Task) -> Iterator[int]:
    """Members as bytes."""
    for sample in get_savable_loader(_dataset(task, _Raw(), batch_size=None)):
        yield len(sample.image) + len(sample.text)


def decoded(task: Task) -> Iterator[Any]:
    """Pillow."""
    for sample in get_savable_loader(_dataset(task, _Pictures(), batch_size=None)):
        yield resize_pillow(sample.image)


def batches(task: Task) -> Iterator[Any]:
    """Batches of the processor."""
    loader = get_savable_loader(_dataset(task, _Training(task.processor), batch_size=BATCH_SIZE))
    if task.start:
        loader.restore_state_rank(torch.load(_state(task), weights_only=False))
    return iter(loader)


def save_state(task: Task) -> None:
    """Read up to `task.start` and keep the loader's state."""
    if _state(task).is_file():
        return
    loader = get_savable_loader(_dataset(task, _Training(task.processor), batch_size=BATCH_SIZE))
    for number, _ in enumerate(loader, start=1):
        if number * BATCH_SIZE >= task.start:
            break
    torch.save(loader.save_state_rank(), _state(task))


def _dataset(task: Task, encoder: Any, batch_size: int | None) -> Any:
    return get_train_dataset(
        str(_folder(task)),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=task.num_workers),
        batch_size=batch_size,
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
        task_encoder=encoder,
    )


def _folder(task: Task) -> Path:
    return task.folder / "energon"


def _state(task: Task) -> Path:
    return _folder(task) / f"state-{task.start}.pt"
