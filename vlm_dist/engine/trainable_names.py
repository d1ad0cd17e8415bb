"""Which parameters are trained: the model, the optimizer's groups and the run's dtype have to agree on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vlm_dist.errors import ModelError


def compute_dtype_of(ds_config: Mapping[str, Any]) -> torch.dtype:
    """What forward and backward compute in, by DeepSpeed's configuration."""
    if ds_config["bf16"]["enabled"]:
        return torch.bfloat16
    return torch.float16 if ds_config["fp16"]["enabled"] else torch.float32


def trainable_names(
    model: nn.Module, param_groups: Sequence[Mapping[str, Any]], compute_dtype: torch.dtype
) -> dict[int, str]:
    """`id(parameter)` -> name of every trainable parameter.

    Raises:
        ModelError: none is trainable, the groups do not hold exactly them, or a weight's dtype is not the run's.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not names:
        raise ModelError("no parameter is trainable; check peft_config.yaml: target_modules and the tower policy")
    grouped = [id(parameter) for group in param_groups for parameter in group["params"]]
    forgotten = [name for key, name in names.items() if key not in set(grouped)]
    if forgotten or len(set(grouped)) != len(grouped) or set(grouped) - set(names):
        raise ModelError(
            f"the optimizer's groups are not the {len(names)} trainable parameters: {len(forgotten)} missing "
            f"{forgotten[:1]}, {len(grouped) - len(set(grouped))} twice, {len(set(grouped) - set(names))} frozen"
        )
    if compute_dtype is torch.float32:
        wrong = {str(p.dtype) for p in model.parameters() if p.is_floating_point()} - {"torch.float32"}
        if wrong:
            raise ModelError(
                "bf16 and fp16 are false in train_config.yaml, but the model was loaded in "
                f"{', '.join(sorted(wrong))}; set loading_params.torch_dtype: float32, or bf16: true"
            )
    return names
