"""Gradient (activation) checkpointing, without making the inputs of frozen towers require gradients."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlm_dist.errors import ModelError


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute activations of each layer in the backward instead of keeping them.

    Non-reentrant: the reentrant kind gives vision LoRA no gradient in several families, and needs inputs that require
    gradients. transformers turns those on by itself, also on the patch embedding, and the backward then runs through
    the whole frozen vision tower (12.01 against 5.40 GF, measured on a tiny Qwen2.5-VL). The LoRA gradients are
    bit-identical without, so the hooks are taken off again.

    Call it after `attach_adapter`: PEFT would put the hooks back on a model that already checkpoints.

    Args:
        model: a `PreTrainedModel`, or a `PeftModel` around one; acts only in `train()` mode.

    Raises:
        ModelError: the model's class does not support it.
    """
    base = base_model(model)
    arguments = {"use_reentrant": False}
    try:
        if hasattr(base, "activation_checkpointing_enable"):  # the name from transformers 5.18 on
            base.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
        else:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    except ValueError as error:
        raise ModelError(f"train.gradient_checkpointing: {error}. Set it to false for this model.") from error
    base.disable_input_require_grads()


def base_model(model: Any) -> Any:
    """The transformers model inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
