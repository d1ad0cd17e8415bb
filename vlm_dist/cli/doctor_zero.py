"""Which ZeRO stage a network bears: what each stage sends, over what was measured."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from vlm_dist.distributed.zero_traffic import Traffic

#: A safetensors header is never larger.
_MAX_HEADER_BYTES = 100_000_000
#: Communication of a micro-batch that is not worth a word: it hides behind the computation.
BEARABLE_SECONDS = 0.25


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters.

    Attributes:
        total: N, of the frozen base.
        trainable: n, of LoRA on all matrices of layers.
    """

    total: int
    trainable: int


def model_size(directory: Path, r: int) -> ModelSize | None:
    """Count in the headers of the safetensors files; None where there are none.

    Args:
        directory: of the model.
        r: rank of LoRA.
    """
    total = trainable = 0
    for path in sorted(directory.glob("*.safetensors")):
        for name, shape in _shapes(path):
            count = 1
            for size in shape:
                count *= size
            total += count
            # embeddings and the head are no layers; a convolution of the patches is not trained
            if len(shape) == 2 and ("layers." in name or "blocks." in name):
                trainable += r * sum(shape)
    return ModelSize(total, trainable) if total else None


def _shapes(path: Path) -> list[tuple[str, list[int]]]:
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > _MAX_HEADER_BYTES:
            return []
        header = json.loads(stream.read(length))
    return [(name, entry["shape"]) for name, entry in header.items() if name != "__metadata__"]


@dataclass(frozen=True)
class ZeroCost:
    """What a step costs on the slowest link.

    Attributes:
        zero2_bytes: of a step under ZeRO-2, for each rank.
        zero3_bytes: of a step under ZeRO-3.
        zero2_seconds, zero3_seconds: over the bandwidth, if nothing hides it.
    """

    zero2_bytes: float
    zero3_bytes: float
    zero2_seconds: float
    zero3_seconds: float


def zero_cost(size: ModelSize, accumulation: int, num_ranks: int, bytes_per_second: float) -> ZeroCost:
    """Bytes of a step and their time.

    Args:
        size: of the model.
        accumulation: micro-batches of a step on each rank.
        num_ranks: W.
        bytes_per_second: of the slowest link, in each direction.
    """
    zero2, zero3 = (
        Traffic(stage, num_ranks, accumulation, num_trained=size.trainable, num_gathered=size.total).sent_bytes
        for stage in (2, 3)
    )
    return ZeroCost(zero2, zero3, zero2 / bytes_per_second, zero3 / bytes_per_second)


def advise(size: ModelSize, cost: ZeroCost, accumulation: int, gpu_bytes: int | None, *, several_nodes: bool) -> str:
    """One sentence: which stage, and why.

    Args:
        size: of the model.
        cost: of a step.
        accumulation: micro-batches of a step on each rank.
        gpu_bytes: memory of the smallest GPU; None: no GPU.
        several_nodes: hpZ has something to save.
    """
    # the base in bfloat16, with a third of the memory for activations and the rest
    fits = gpu_bytes is None or 2 * size.total < 0.66 * gpu_bytes
    if fits and cost.zero3_seconds > BEARABLE_SECONDS * accumulation:
        return "ZeRO-2: ZeRO-3 would gather the base over this link in every micro-batch"
    if fits:
        return "ZeRO-2: the base fits each GPU, and least is sent"
    if several_nodes and cost.zero3_seconds > BEARABLE_SECONDS * accumulation:
        return "ds_configs/zero3_hpz.json: the base does not fit one GPU, and this link is too slow to gather it over"
    return "ZeRO-3: the base does not fit one GPU (or peft.quantization: nf4 with ZeRO-2)"
