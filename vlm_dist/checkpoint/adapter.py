"""The adapter in PEFT's own format, from masters that were collected by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from vlm_dist.errors import CheckpointError


@dataclass(frozen=True)
class AdapterExport:
    """What the adapter files hold.

    Attributes:
        config: of adapter_config.json.
        tensors: by PEFT's canonical keys, in the training dtype: `PeftModel.from_pretrained` loads them.
        outside: trained weights that are no part of the adapter (a tower trained in full), by their name in the base
            model: `model.load_state_dict(..., strict=False)` loads them.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    outside: Mapping[str, Tensor] = field(default_factory=dict)


def export_adapter(
    model: nn.Module, masters: Mapping[str, Tensor], dtype: torch.dtype, adapter: str = "default"
) -> AdapterExport:
    """Name and round what was trained. Reads no weight of the model, which may be partitioned.

    Args:
        model: the PEFT model that was trained.
        masters: whole float32 tensors by the names of `model.named_parameters()`.
        dtype: that the model computes in; masters are rounded to it as they are for the forward pass.
        adapter: PEFT's name of the adapter.

    Raises:
        CheckpointError: the model has no adapter.
    """
    if not isinstance(model, PeftModel):
        raise CheckpointError(f"{type(model).__name__} has no adapter to save; attach one first")
    rounded = {name: tensor.to(dtype).contiguous() for name, tensor in masters.items()}
    # save_embedding_layers="auto" would ask the hub whether the vocabulary was resized.
    tensors = get_peft_model_state_dict(
        model, state_dict=dict(rounded), adapter_name=adapter, save_embedding_layers=False
    )
    inside = {id(tensor) for tensor in tensors.values()}
    outside = {
        name.removeprefix("base_model.model."): tensor for name, tensor in rounded.items() if id(tensor) not in inside
    }
    return AdapterExport(_config_of(model, adapter), tensors, outside)


def _config_of(model: PeftModel, adapter: str) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it, except that sets are sorted, so that equal runs write equal bytes."""
    config = {key: _jsonable(value) for key, value in model.peft_config[adapter].to_dict().items()}
    config["inference_mode"] = True
    if not config.get("base_model_name_or_path"):
        config["base_model_name_or_path"] = getattr(model.get_base_model(), "name_or_path", None)
    return config


def _jsonable(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _jsonable(inner) for key, inner in value.items()}
    return value
