from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_dist.config.peft import PeftConfig
from vlm_dist.config.vlm_model import ModelClassEntry
from vlm_dist.demo.tiny_model import TinyShape, save_tiny_qwen2_vl
from vlm_dist.model import load_model, load_processor

SHAPE = TinyShape(
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_key_value_heads=2,
    vision_dim=32,
    vision_depth=2,
    vision_heads=2,
    min_pixels=56 * 56,
    max_pixels=112 * 112,
)

ENTRY = ModelClassEntry(
    model_class="Qwen2VLForConditionalGeneration", processor_class="Qwen2VLProcessor", import_path="transformers"
)
ALL_LORA = {"vision": "lora", "projector": "lora", "language": "lora"}


def lora(**changes: Any) -> PeftConfig:
    return PeftConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **changes})


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that would reach for the hub fails at once instead of waiting."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_qwen2_vl(tmp_path_factory.mktemp("tiny") / "qwen2-vl", SHAPE, dtype=torch.float32)


@pytest.fixture
def tiny_model(tiny_dir: Path) -> Any:
    return load_model(str(tiny_dir), ENTRY, {"torch_dtype": "float32"})


@pytest.fixture(scope="session")
def tiny_processor(tiny_dir: Path) -> Any:
    return load_processor(str(tiny_dir), ENTRY)


@pytest.fixture(scope="session")
def inputs(tiny_processor: Any) -> dict[str, torch.Tensor]:
    """Two rows with a picture each."""
    from PIL import Image

    texts = [
        f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n"
        for question in ("Which digit is this?", "What is in the image?")
    ]
    pictures = [Image.linear_gradient("L").convert("RGB").resize((56, 56)), Image.new("RGB", (84, 56), "red")]
    return dict(tiny_processor(text=texts, images=pictures, padding=True, return_tensors="pt"))
