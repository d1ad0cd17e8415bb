"""`processor_params` take effect in every family: a picture comes out otherwise than without them."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.unit.families.zoo import CHECKPOINTS
from vlm_dist.model import load_processor

_SQUARE = {"height": 42, "width": 42}
#: Family -> arguments.
PARAMS: dict[str, list[dict[str, Any]]] = {
    "qwen2_vl": [{"max_pixels": 28 * 28 * 4}, {"size": {"longest_edge": 28 * 28 * 4}}],
    "qwen2_5_vl": [{"max_pixels": 28 * 28 * 4}],
    "qwen3_vl": [{"size": {"longest_edge": 32 * 32 * 4}}],
    "glm4v": [{"size": {"longest_edge": 28 * 28 * 4}}],
    "llava": [{"size": {"shortest_edge": 42}, "crop_size": _SQUARE}],
    "llava_next": [{"image_grid_pinpoints": [[28, 28]]}],
    "llava_next_video": [{"image_grid_pinpoints": [[28, 28]]}],
    "llava_onevision": [{"image_grid_pinpoints": [[28, 28]]}],
    "internvl": [{"max_patches": 6}, {"images_kwargs": {"max_patches": 6}}],
    "paligemma": [{"size": _SQUARE}],
    "gemma3": [{"size": _SQUARE}],
    "idefics2": [{"size": {"longest_edge": 42}}],
    "idefics3": [{"size": {"longest_edge": 28}}],
    "smolvlm": [{"size": {"longest_edge": 28}}],
    "pixtral": [{"size": {"longest_edge": 56}}],
    "mistral3": [{"size": {"longest_edge": 56}}],
    "mllama": [{"max_image_tiles": 1}],
}
#: Arguments of the processor itself.
OWN = [
    ("internvl", {"image_seq_length": 9}),
    ("llava", {"num_additional_image_tokens": 3}),
    ("idefics3", {"image_seq_len": 9}),
    ("gemma3", {"image_seq_length": 9}),
]


@cache
def directory(name: str) -> Path:
    return CHECKPOINTS[name].save(Path(tempfile.mkdtemp(prefix="vlm-dist-zoo-")) / name)


def pixels(processor: Any) -> torch.Tensor:
    picture = Image.linear_gradient("L").convert("RGB").resize((200, 120))
    made = processor.image_processor([[picture]], return_tensors="pt")["pixel_values"]
    return made if isinstance(made, torch.Tensor) else torch.as_tensor(made[0])


def test_no_family_is_forgotten() -> None:
    assert sorted(PARAMS) == sorted(CHECKPOINTS)


@pytest.mark.parametrize(("name", "params"), [(name, params) for name in PARAMS for params in PARAMS[name]])
def test_arguments_take_effect(name: str, params: dict[str, Any]) -> None:
    entry = CHECKPOINTS[name].entry
    before = pixels(load_processor(str(directory(name)), entry))
    assert pixels(load_processor(str(directory(name)), entry, params)).shape != before.shape


@pytest.mark.parametrize(("name", "params"), OWN)
def test_arguments_of_the_processor_itself_take_effect(name: str, params: dict[str, Any]) -> None:
    processor = load_processor(str(directory(name)), CHECKPOINTS[name].entry, params)
    assert {key: getattr(processor, key) for key in params} == params


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_a_checkpoint_names_its_own_processor(name: str) -> None:
    from vlm_dist.config.vlm_model import ModelClassEntry

    assert type(load_processor(str(directory(name)), ModelClassEntry())).__name__ == CHECKPOINTS[name].processor_class
