"""LoRA's update added by the product that makes it, instead of scaled and added in passes of their own.

PEFT computes `result + lora_B(lora_A(x)) * scaling`: three tensors as large as the layer's output are written and five
are read, for two small matrix products. `torch.addmm` does the scaling and the sum while it multiplies. What is saved
for the backward, and the parameters' names, stay what they are.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

# Shapes: ... rows, I inputs and O outputs of a layer, r rank


def fuse_lora(model: nn.Module) -> int:
    """Have plain LoRA layers add their update in one product.

    Left as they are: DoRA and PEFT's other variants, layers in 4 bits, biases of LoRA's own, and weights that ZeRO-3
    partitions, which are there only while their own module is called.

    Args:
        model: with its adapter; is changed.

    Returns:
        How many layers do.
    """
    from peft.tuners.lora.layer import Linear

    count = 0
    for module in model.modules():
        if type(module) is Linear and all(_is_plain(module, name) for name in module.lora_A):
            # its own forward, not another class: PEFT and we know layers by their class
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
            count += 1
    return count


def _is_plain(layer: Any, adapter: str) -> bool:
    up = layer.lora_B[adapter]
    return adapter not in layer.lora_variant and up.bias is None and not _is_partitioned(up.weight)


def _is_partitioned(weight: Tensor) -> bool:
    return hasattr(weight, "ds_id")  # DeepSpeed's mark


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Like the layer's own: x [..., I] -> [..., O]."""
    adapters = self.active_adapters
    if self.disable_adapters or self.merged or args or kwargs or len(adapters) != 1 or adapters[0] not in self.lora_A:
        return type(self).forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
    name = adapters[0]
    down, up = self.lora_A[name], self.lora_B[name].weight
    if _is_partitioned(up) or x.dtype != up.dtype or x.dim() < 2:
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    result: Tensor = self.base_layer(x)
    inner = down(self.lora_dropout[name](x))  # [..., r]
    rows = torch.addmm(result.flatten(0, -2), inner.flatten(0, -2), up.t(), alpha=self.scaling[name])
    return rows.view(result.shape)
