"""vlm_dist: the plan, the tar source and the materialiser, as the trainer uses them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.ipc  # noqa: F401 - of the indexes: else it is imported with the first sample
import torch
from transformers import Qwen2VLProcessor

from tests.bench.data.task import BATCH_SIZE, DECODED_SIDE, GLOBAL_BATCH_SIZE, SEED, Task
from vlm_dist.config.vlm_collator import VlmCollatorConfig
from vlm_dist.data.feed import FEED_FIELDS, StepFeed
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.media.images import decode_image
from vlm_dist.data.plan.plan import Plan, PlanSettings
from vlm_dist.data.sources import open_source
from vlm_dist.data.sources.tar import TarSource
from vlm_dist.data.types import Source
from vlm_dist.data.workers.allocator import keep_freed_memory
from vlm_dist.data.workers.pool import WorkerPool
from vlm_dist.distributed.agreement import StepAgreement
from vlm_dist.families import family_for

torch.set_num_threads(1)

SETTINGS = (
    f"tar shards with their indexes; `Plan` in mode `padding`, {GLOBAL_BATCH_SIZE} samples a step, micro-batches of "
    f"{BATCH_SIZE}, windows of 64 steps; `TarSource.read` (raw: `read_members`); `decode_image`; `Materialiser` "
    "through `WorkerPool`, with workers through `StepFeed`"
)
FORM = "tar"  # folder of what it reads
RESUME = "`Plan.step(k)`: nothing is replayed"


@dataclass(frozen=True)
class _Settings:
    path: str
    type: str = "tar"
    columns: Any = None


def prepare(task: Task) -> None:
    """Nothing: the shards were written with their indexes."""


def raw(task: Task) -> Iterator[int]:
    """Members as bytes, in the plan's order."""
    source = _open(task)
    assert isinstance(source, TarSource)
    keep_freed_memory()  # as WorkerPool does in every process that makes micro-batches
    for ref in _refs(_plan(task, source)):
        sample = source.read_members(ref.index)
        yield len(sample["jpg"]) + len(sample["json"])


def decoded(task: Task) -> Iterator[Any]:
    """The decoder of the trainer."""
    source = _open(task)
    for ref in _refs(_plan(task, source)):
        yield decode_image(source.read(ref.index).fields["jpg"], resize_mode="stretch", max_size=DECODED_SIDE)


def batches(task: Task) -> Iterator[Any]:
    """Micro-batches of the feed."""
    source = _open(task, image="jpg")
    materialiser = Materialiser(
        [source],
        Qwen2VLProcessor.from_pretrained(task.processor),
        family_for("qwen2_vl"),
        _collator(),
        frozenset({"image"}),
        SEED,
    )
    pool = WorkerPool(materialiser, task.num_workers)
    assert task.start % GLOBAL_BATCH_SIZE == 0
    plan = _plan(task, source)
    first = task.start // GLOBAL_BATCH_SIZE
    if task.num_workers == 0:
        # the feed gives whole steps; the first micro-batch is what a peer's first batch is compared with
        for step in plan.steps(first):
            for job in step.for_rank(0, 1):
                yield pool.submit(job).result()
        return
    with StepFeed(plan, pool, 0, 1, StepAgreement(FEED_FIELDS), first) as feed:
        for step in feed:
            if step.error is not None:
                raise step.error
            yield from step.micro_batches


def _open(task: Task, **columns: str) -> Source:
    return open_source(_Settings(str(task.folder / "tar"), columns=columns or None))


def _plan(task: Task, source: Source) -> Plan:
    return Plan([source], [1.0], PlanSettings(GLOBAL_BATCH_SIZE, BATCH_SIZE, seed=SEED, num_epochs=1000.0))


def _refs(plan: Plan) -> Iterator[Any]:
    for step in plan.steps():
        yield from (ref for ref in itertools.chain.from_iterable(step.micro_batches) if ref is not None)


def _collator() -> VlmCollatorConfig:
    """The peers' message and labels: the picture, the question, and loss on the answer alone."""
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "{question_column}"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "{answer_column}"}]},
    ]
    return VlmCollatorConfig.model_validate(
        {
            "dataset_columns": {"image_column": "image", "question_column": "question", "answer_column": "answer"},
            "message_format": {"training_messages": messages},
            "label_masking": {"mask_input_tokens": True},
        }
    )
