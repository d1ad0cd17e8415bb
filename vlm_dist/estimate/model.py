"""What a model holds, counted where it has no weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlm_dist.config import RunConfig
from vlm_dist.model import enable_gradient_checkpointing, parse_dtype
from vlm_dist.model.checkpointing import base_model, block_names
from vlm_dist.model.towers import find_towers, tower_of

#: NF4 with its scales in 8 bits per 64 weights, and theirs in float32 per 256 of them.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Weights:
    """Numbers of weights, each counted once.

    Attributes:
        num_frozen: elements of the base that are not trained.
        num_trained: of what is.
        frozen_bytes: as they are held for computing.
        element_bytes: of a weight that is not quantised, and of an activation.
        num_small_frozen: of frozen ones, in parameters that ZeRO-3 does not cut.
        num_small_trained: the same of trained ones.
        by_tower: tower -> (all, trained).
    """

    num_frozen: int
    num_trained: int
    frozen_bytes: float
    element_bytes: int
    num_small_frozen: int
    num_small_trained: int
    by_tower: dict[str, tuple[int, int]]


def count_language_blocks(model: Any) -> int:
    """How many blocks of the language model can be recomputed one by one; 0 where it is all of them or none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    base = base_model(model)
    towers = find_towers(base)
    blocks = [name for name in block_names(base) if tower_of(name, towers) == "language"]
    return len(blocks) if all(isinstance(base.get_submodule(n), GradientCheckpointingLayer) for n in blocks) else 0


@contextlib.contextmanager
def recomputing(model: nn.Module, config: RunConfig, wanted: bool, first_blocks: int | None = None) -> Iterator[None]:
    """Within, the model is with gradient checkpointing as the run's policy says, or without.

    Args:
        model: from `meta_model`.
        config: of the run.
        wanted: with it.
        first_blocks: of the language model, in the place of what the policy says of it.
    """
    if wanted:
        policy = config.train.gradient_checkpointing_policy.model_dump()
        if first_blocks is not None:
            policy["language"] = first_blocks
        enable_gradient_checkpointing(model, **policy)
    try:
        yield
    finally:
        for module in base_model(model).modules():
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False


def count_weights(model: Any, config: RunConfig, persistence_threshold: int) -> Weights:
    """Count a model's weights; shared ones once.

    Args:
        model: from `meta_model`.
        config: of the run.
        persistence_threshold: elements up to which ZeRO-3 leaves a parameter whole.
    """
    base = base_model(model)
    towers = find_towers(base)
    size = torch.empty(0, dtype=parse_dtype(config.train.precision)).element_size()
    packed = _quantised(base) if config.peft.quantization != "none" else set()
    numbers = {"frozen": 0, "trained": 0, "small frozen": 0, "small trained": 0}
    frozen_bytes = 0.0
    by_tower: dict[str, tuple[int, int]] = {}
    for name, parameter in base.named_parameters():
        count = parameter.numel()
        kind = "trained" if parameter.requires_grad else "frozen"
        numbers[kind] += count
        if count < persistence_threshold:
            numbers[f"small {kind}"] += count
        if kind == "frozen":
            frozen_bytes += count * (_NF4_BYTES if id(parameter) in packed else size)
        tower = tower_of(name, towers)
        total, trained = by_tower.get(tower, (0, 0))
        by_tower[tower] = total + count, trained + count * parameter.requires_grad
    return Weights(
        numbers["frozen"], numbers["trained"], frozen_bytes, size, numbers["small frozen"], numbers["small trained"],
        by_tower,
    )  # fmt: skip


def _quantised(base: Any) -> set[int]:
    """Weights that bitsandbytes packs: of linear layers, but the head's."""
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return {
        id(module.weight)
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".lora_" not in name
    }
