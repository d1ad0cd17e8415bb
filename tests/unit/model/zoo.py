"""The tiny checkpoints of all families as towers are tried on: saved once, and one input with a picture each."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tests.unit.families.zoo import CHECKPOINTS
from vlm_dist.config.vlm_model import ModelClassEntry
from vlm_dist.model import load_model, load_processor

FAMILIES = list(CHECKPOINTS)
#: How a picture is written where the processor's own `image_token` is not what it replaces.
_MARKERS = {"gemma3": "<start_of_image>", "pixtral": "[IMG]", "mistral3": "[IMG]"}


@dataclass(frozen=True)
class Kind:
    """One family on disk."""

    name: str
    directory: Path
    entry: ModelClassEntry
    inputs: dict[str, Tensor]

    def load(self) -> Any:
        return load_model(str(self.directory), self.entry, dtype="float32")

    def logits(self, model: nn.Module) -> Tensor:
        """Of every position, [B, T, V]."""
        found: Tensor = model(**self.inputs, use_cache=False).logits
        return found


@functools.cache
def kind(name: str) -> Kind:
    """Save one; kept for the life of the process."""
    checkpoint = CHECKPOINTS[name]
    directory = checkpoint.save(Path(tempfile.mkdtemp(prefix="vlm-dist-towers-")) / name)
    processor = load_processor(str(directory), checkpoint.entry)
    marker = _MARKERS.get(name) or str(processor.image_token)
    noise = np.random.default_rng(0).integers(0, 255, (56, 84, 3), dtype=np.uint8)
    encoded = processor(
        text=[f"{marker}What is it? Noise."], images=[[Image.fromarray(noise)]], return_tensors="pt", padding=True
    )
    return Kind(name, directory, checkpoint.entry, dict(encoded))


def move(model: nn.Module, seed: int = 0) -> None:
    """Change all that is trained, as a few steps would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
