from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.unit.model.conftest import ENTRY
from vlm_dist.config.vlm_model import ProcessorParams
from vlm_dist.errors import ModelError
from vlm_dist.model import load_processor

PATCH = 28 * 28  # one token is 2 x 2 patches of 14 x 14 pixels


def num_image_tokens(processor: Any) -> int:
    batch = processor.image_processor([Image.new("RGB", (560, 560))], return_tensors="pt")
    return int(batch["image_grid_thw"].prod()) // 4


def num_video_tokens(processor: Any) -> int:
    frames = [np.zeros((4, 560, 560, 3), dtype=np.uint8)]
    batch = processor.video_processor(frames, do_sample_frames=False, return_tensors="pt")
    return int(batch["video_grid_thw"].prod()) // 4


@pytest.mark.parametrize(
    ("params", "image_tokens", "video_tokens"),
    [
        ({}, 16, 32),  # the checkpoint's max_pixels: 112 x 112
        ({"max_pixels": 64 * PATCH}, 64, 128),
        ({"size": {"longest_edge": 64 * PATCH}}, 64, 128),
        ({"size": {"shortest_edge": 4 * PATCH, "longest_edge": 36 * PATCH}}, 36, 72),
        ({"images_kwargs": {"max_pixels": 64 * PATCH}}, 64, 32),
        ({"videos_kwargs": {"max_pixels": 64 * PATCH}}, 16, 128),
        ({"max_pixels": PATCH}, 1, 2),  # below the checkpoint's min_pixels, which gives way
        ({"min_pixels": 900 * PATCH}, 900, 1800),  # above its max_pixels
    ],
)
@pytest.mark.parametrize("form", ["size", "min_pixels"])
def test_pixel_limits_take_effect(
    tiny_dir: Path, tmp_path: Path, params: dict[str, Any], image_tokens: int, video_tokens: int, form: str
) -> None:
    """Checkpoints say their limits in two forms; in the older one they would win over a `size` of the user."""
    directory = Path(shutil.copytree(tiny_dir, tmp_path / "copy"))
    if form == "min_pixels":
        path = directory / "processor_config.json"
        content = json.loads(path.read_text())
        for part in ("image_processor", "video_processor"):
            size = content[part].pop("size")
            content[part] |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        path.write_text(json.dumps(content))
    processor = load_processor(str(directory), ENTRY, ProcessorParams.model_validate(params))
    assert (num_image_tokens(processor), num_video_tokens(processor)) == (image_tokens, video_tokens)


def test_other_arguments_take_effect(tiny_dir: Path) -> None:
    params = {"do_normalize": False, "padding_side": "left", "chat_template": "{{ messages[0]['content'] }}"}
    processor = load_processor(str(tiny_dir), ENTRY, params)
    assert processor.image_processor.do_normalize is False
    assert processor.tokenizer.padding_side == "left"
    assert processor.apply_chat_template([{"role": "user", "content": "hello"}]) == "hello"


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"max_pixel": 1}, "max_pixel: .* did you mean 'max_pixels'"),
        ({"videos_kwargs": {"max_frame": 1}}, "max_frame: .* did you mean 'max_frames'"),
        ({"images_kwargs": 3}, "images_kwargs: got 3"),
        ({"return_tensors": "pt"}, "the collator decides"),
        ({"size": {"height": 5, "width": 5}}, r"cannot process an image with them.*shortest_edge.*12544"),
        ({"min_pixels": 100 * PATCH, "max_pixels": PATCH}, "raise max_pixels or lower min_pixels"),
    ],
)
def test_wrong_arguments_are_refused(tiny_dir: Path, params: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelError, match=f"(?s)processor_params.*{expected}"):
        load_processor(str(tiny_dir), ENTRY, params)
