"""What a model is shown to prove something: held-out samples of its run, or a picture made here."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vlm_dist.build.answering import Prompts
from vlm_dist.build.data import make_materialisers, open_sources_alone
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.types import MicroBatchJob, SampleRef, Source
from vlm_dist.errors import ConfigError, DataError
from vlm_dist.export.opening import Origin
from vlm_dist.families import Family

NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Example:
    """Inputs of one forward pass.

    Attributes:
        name: where it comes from.
        inputs: of the model, B = 1, without labels.
    """

    name: str
    inputs: dict[str, Any]


def examples(origin: Origin, processor: Any, family: Family) -> Iterator[Example]:
    """A few samples of the run, of different sources where it has some; without its data a picture of our own.

    Args:
        origin: of the adapter.
        processor: of the run.
        family: its row.
    """
    found = list(_held_out(origin, processor, family))
    yield from found or [_own(origin, processor, family)]


def _held_out(origin: Origin, processor: Any, family: Family) -> Iterator[Example]:
    config = origin.config
    which = "eval" if config.data.eval else "train"
    try:
        sources: list[Source] = open_sources_alone(config, which)
        made = make_materialisers(config, sources, sources, processor, family).materialisers["eval"]
    except (DataError, ConfigError):
        return  # its data are not here
    assert isinstance(made, Materialiser)
    refs = [(number, index) for index in range(NUM_EXAMPLES) for number in range(len(sources))]
    left = NUM_EXAMPLES
    for number, index in refs:
        if not left or index >= len(sources[number]):
            continue
        try:
            batch = made(MicroBatchJob(0, 0, (SampleRef(number, index),), "eval"))
        except DataError:
            return
        if batch.num_samples:
            left -= 1
            yield Example(str(batch.origins[0]), _floats(batch.inputs))


def _own(origin: Origin, processor: Any, family: Family) -> Example:
    """A question about a picture of noise, as the run asks."""
    pixels = np.random.default_rng(0).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    images = [stream.getvalue()] if origin.config.collator.data_processing.image_data else []
    batch = Prompts(origin.config, processor, family).prompt("What is this?", images)
    return Example("a picture made here (the run's data are not)", _floats(batch.inputs))


def _floats(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
