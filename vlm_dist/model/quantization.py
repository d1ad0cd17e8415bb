"""QLoRA: the frozen base in 4 bits (NF4, by bitsandbytes), the adapter in the training dtype.

For stages 1 and 2, where each rank holds the whole base: ZeRO-3 would cut the packed bytes away from the scales that
they need. Linear layers are quantised, in all towers; the head, embeddings, norms and convolutions keep their dtype.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from vlm_dist.errors import ConfigError, ModelError

KEY = "peft.quantization"


def check_quantization(quantization: str, zero_stage: int) -> None:
    """Refuse before anything is loaded what cannot work.

    Args:
        quantization: `none` or `nf4`.
        zero_stage: of the DeepSpeed configuration.

    Raises:
        ConfigError: ZeRO-3, or bitsandbytes is not installed.
    """
    if quantization == "none":
        return
    if zero_stage == 3:
        raise ConfigError(
            f"{KEY}: {quantization} does not work under ZeRO-3, which cannot partition packed weights; use "
            "deepspeed: ds_configs/zero2.json (the base in 4 bits is a quarter of its size), or quantization: none"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{KEY}: {quantization} needs bitsandbytes: pip install 'vlm-dist[qlora]'")


def quantization_arguments(quantization: str, compute_dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained`; none without quantisation.

    Args:
        quantization: `none` or `nf4`.
        compute_dtype: that weights are unpacked to for a product.
    """
    if quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=True,
    )
    return {"quantization_config": config}


def is_quantised(parameter: torch.Tensor) -> bool:
    """Whether it holds packed 4-bit numbers."""
    return hasattr(parameter, "quant_state")


def num_elements(parameter: torch.Tensor) -> int:
    """Number of weights, also where they are packed or partitioned."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(state.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def check_trainable(modules: dict[str, nn.Module]) -> None:
    """Refuse to train modules in full whose weights are packed.

    Raises:
        ModelError: names the first.
    """
    for name, module in modules.items():
        if any(is_quantised(parameter) for parameter in module.parameters()):
            raise ModelError(
                f"{name} cannot be trained in full beside {KEY}: nf4, which packs its weights; train it with LoRA, or "
                "set quantization: none"
            )


def finish_quantised(adapted: nn.Module, dtype: torch.dtype) -> None:
    """Give the adapter on packed layers the training dtype; let a CPU keep one layout of the packed weights.

    PEFT takes the adapter's dtype from its layer, which has none here. On a CPU bitsandbytes repacks a layer in its
    first evaluation, and can no longer train it then.
    """
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in adapted.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - an attribute that nn.Module does not know
