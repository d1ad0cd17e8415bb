"""What was trained in PEFT's own format, from masters that were collected by name.

Beside LoRA it may hold weights of the model itself (a tower trained in full, `modules_to_save`, biases). They were
trained in place, and are saved as PEFT saves `modules_to_save`: under their own names, the modules that hold them
listed in adapter_config.json. A few cannot be listed, such as `image_newline`, a parameter of LLaVA-NeXT itself, or a
trained bias beside a frozen weight: they are in the file all the same, and `PeftModel.from_pretrained` puts what has
the name of a parameter into that parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from vlm_dist.model.full import listed_modules

#: Before every name of the model within a `PeftModel`.
PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterExport:
    """What the adapter files hold.

    Attributes:
        config: of adapter_config.json; None if there is no adapter, as everything was trained in full.
        tensors: by PEFT's canonical keys, in the training dtype: `PeftModel.from_pretrained` loads them.
        outside: without an adapter, what was trained by its name in the model:
            `model.load_state_dict(..., strict=False)` loads it.
    """

    config: Mapping[str, Any] | None
    tensors: Mapping[str, Tensor]
    outside: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterForm:
    """How what is trained is written down; the same during the whole run, so that a thread can do it.

    Attributes:
        keys: of the saved file -> the parameters that they hold, by name in the model.
        config: of adapter_config.json; None without an adapter.
        dtype: that the model computes in; masters are rounded to it as they are for the forward pass.
    """

    keys: Mapping[str, str]
    config: Mapping[str, Any] | None
    dtype: torch.dtype

    @classmethod
    def of(
        cls, model: nn.Module, dtype: torch.dtype, adapter: str = "default", names: Iterable[str] | None = None
    ) -> AdapterForm:
        """Find out. Reads no weight of the model, which may be partitioned.

        Args:
            model: that is trained.
            dtype: that it computes in.
            adapter: PEFT's name of the adapter.
            names: of what is trained, as `model.named_parameters()` has them; None: what has a gradient.
        """
        if names is None:
            names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        keys = saved_names(model, names, adapter)
        if not isinstance(model, PeftModel):
            return cls(keys, None, dtype)
        trained_whole = [key.removeprefix(PREFIX) for key, name in keys.items() if ".lora_" not in name]
        config = _config_of(model, adapter)
        config["modules_to_save"] = listed_modules(model.get_base_model(), trained_whole) or None
        return cls(keys, config, dtype)

    def export(self, masters: Mapping[str, Tensor]) -> AdapterExport:
        """Name and round what was trained.

        Args:
            masters: whole float32 tensors by the names of `model.named_parameters()`.
        """
        rounded = {name: tensor.to(self.dtype).contiguous() for name, tensor in masters.items()}
        if self.config is None:
            return AdapterExport(None, {}, rounded)
        return AdapterExport(self.config, {key: rounded[name] for key, name in self.keys.items()})


def export_adapter(
    model: nn.Module, masters: Mapping[str, Tensor], dtype: torch.dtype, adapter: str = "default"
) -> AdapterExport:
    """Name and round what was trained, once; see `AdapterForm`."""
    return AdapterForm.of(model, dtype, adapter, masters).export(masters)


def saved_names(model: nn.Module, names: Iterable[str], adapter: str = "default") -> dict[str, str]:
    """Keys of the saved file -> the parameters that they hold, by name in the model.

    A tied weight has a key for each of its names, since PEFT makes a copy of each module that it wraps.

    Args:
        model: with or without adapter.
        names: of trainable parameters.
        adapter: PEFT's name of the adapter.
    """
    if not isinstance(model, PeftModel):
        return {name: name for name in names}
    marks = {name: torch.empty(0) for name in names}
    # save_embedding_layers="auto" would ask the hub whether the vocabulary was resized.
    found = get_peft_model_state_dict(model, state_dict=dict(marks), adapter_name=adapter, save_embedding_layers=False)
    name_of = {id(mark): name for name, mark in marks.items()}
    keys = {key: name_of[id(mark)] for key, mark in found.items()}
    beside = set(marks) - set(keys.values())
    by_parameter = {id(parameter): name for name, parameter in model.named_parameters() if name in beside}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in by_parameter:
            keys[name] = by_parameter[id(parameter)]
    return keys


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
