"""Whether a model's attention can work with the borders of samples, and setting it to."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from vlm_dist.errors import ModelError
from vlm_dist.model.attention.kernels import kernel_name
from vlm_dist.model.attention.names import VARLEN, VARLEN_OF_PICTURES
from vlm_dist.model.towers import find_towers

KEY = "loading_params.attn_implementation"
#: By this argument a block of a vision tower is told where one picture ends and the next begins.
_BORDERS = "cu_seqlens"


def choose_attention(model: Any, wanted: str | None, *, is_packed: bool, is_compiled: bool = False) -> str | None:
    """Give a model whose attention nobody named the one that packs need, if it can.

    Args:
        model: a transformers model without adapter; changed.
        wanted: `attn_implementation` of the configuration.
        is_packed: samples share a row.
        is_compiled: its blocks are to be compiled.

    Returns:
        The reason why packs need a mask all the same; None where they need none, or it was not asked.

    Raises:
        ModelError: `varlen` is wanted, and not possible.
    """
    if wanted == VARLEN:
        use_varlen(model, is_compiled=is_compiled)
    elif wanted is None and is_packed:
        reason = varlen_refusal(model, is_compiled=is_compiled)
        if reason is not None:
            return reason
        use_varlen(model, is_compiled=is_compiled)
    return None


def varlen_refusal(model: Any, *, is_compiled: bool = False) -> str | None:
    """Why a model cannot work without a mask between samples; None where it can.

    Args:
        model: a transformers model without adapter.
        is_compiled: its blocks are to be compiled.
    """
    language = model.get_submodule(find_towers(model)["language"][0])
    config = model.config.get_text_config()
    name = type(language).__name__
    if not isinstance(language, PreTrainedModel) or not _hands_on(language):
        return f"{name} calls an attention of its own"
    if language.config is not config:
        return f"{name} has settings of its own"
    if config._attn_implementation not in ("sdpa", VARLEN):
        return f"{name} has no SDPA"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{name} caps its scores"
    if getattr(config, "attention_chunk_size", None) is not None:
        return f"{name} cuts samples into chunks"
    if is_compiled and float(getattr(config, "attention_dropout", 0)) > 0:
        return f"{name} drops weights of its attention, which no compiled block does sample by sample"
    return None


def use_varlen(model: Any, *, is_compiled: bool = False) -> None:
    """Set the language model, and a vision tower that is told where its pictures end, to variable-length attention.

    Args:
        model: a transformers model without adapter.
        is_compiled: its blocks are to be compiled.

    Raises:
        ModelError: it cannot work so.
    """
    reason = varlen_refusal(model, is_compiled=is_compiled)
    if reason is not None:
        raise ModelError(f"{KEY}: {VARLEN} is not possible for {type(model).__name__}: {reason}; set it to null")
    model.config.get_text_config()._attn_implementation_internal = VARLEN
    for root in find_towers(model)["vision"]:
        tower = model.get_submodule(root)
        if isinstance(tower, PreTrainedModel) and _hands_on(tower) and _is_told(tower):
            tower.config._attn_implementation_internal = VARLEN_OF_PICTURES


def describe_varlen(model: Any, device: torch.device, dtype: torch.dtype) -> str:
    """What computes what, in one line."""
    pictures = attention_of(model)[1] == VARLEN_OF_PICTURES
    whose = "samples of a pack, and pictures in the vision tower" if pictures else "samples of a pack"
    return f"{VARLEN}: {whose}, each over itself, by {kernel_name(device, dtype)}"


def attention_of(model: Any) -> tuple[str | None, str | None]:
    """What attention the language model and the vision tower have, by transformers' names.

    Args:
        model: a transformers model, with adapters in its layers where it has some.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    vision = [_implementation(model.get_submodule(root)) for root in find_towers(model)["vision"]]
    named = [name for name in vision if name is not None]
    own = getattr(model.config, "_attn_implementation", None)
    return getattr(config, "_attn_implementation", None) or own, (named[0] if named else own)


def _implementation(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _hands_on(model: PreTrainedModel) -> bool:
    """Whether its layers call attention by name, with all arguments that they are given."""
    return bool(getattr(model, "_supports_attention_backend", False)) and model._can_set_attn_implementation()


def _is_told(tower: nn.Module) -> bool:
    return any(_BORDERS in inspect.signature(type(module).forward).parameters for module in tower.modules())
