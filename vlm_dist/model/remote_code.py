"""What model code written for an older transformers needs in order to load and train; one model's own quirks aside.

Only for classes out of a model's repository; those of transformers are left alone.
"""

from __future__ import annotations

import copy
import logging
import sys
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)


def is_remote(loaded_by: type[Any]) -> bool:
    """Whether a class comes out of a model's repository."""
    return loaded_by.__module__.startswith("transformers_modules.")


def made_ready(model_class: type[Any]) -> type[Any]:
    """The class with what transformers 5 expects of it: a table of tied weights, and `generate`."""
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    if not hasattr(model_class, "all_tied_weights_keys"):  # set by post_init, which not every model calls
        model_class.all_tied_weights_keys = {}
    ready: type[Any] = add_generation_mixin_to_remote_model(model_class)  # type: ignore[no-untyped-call]
    expand = ready.get_expanded_tied_weights_keys

    def expand_list(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self._tied_weights_keys, list | tuple | set):  # of old: names alone, tied to the embedding
            self._tied_weights_keys = _tied_to_embedding(self, self._tied_weights_keys)
        return expand(self, *args, **kwargs)

    ready.get_expanded_tied_weights_keys = expand_list
    return ready


def make_parts_known(processor_class: type[Any]) -> None:
    """Let transformers find the parts of a processor that its class names as text: it looks for them in itself alone.

    Code that knows this puts them there, but into a module that is not always the one that is looked into.
    """
    from transformers import processing_utils

    own, known = sys.modules[processor_class.__module__], processing_utils.transformers_module
    for attribute, name in vars(processor_class).items():
        if attribute.endswith("_class") and isinstance(name, str) and hasattr(own, name) and not hasattr(known, name):
            setattr(known, name, getattr(own, name))


def default_attention(model_class: type[Any]) -> str:
    """The attention to use where the user names none; the checkpoint's own wish may be one that is not installed."""
    return "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"


def recompute_buffers(model: Any, model_class: type[Any]) -> list[str]:
    """Give the buffers that no checkpoint holds (rotary frequencies, positions) the values that `__init__` computes.

    transformers makes a model without memory and then allocates such buffers without filling them; it knows how to
    compute those of its own classes only. Nothing tells: the loss is merely wrong, or not a number.

    Args:
        model: as loaded; changed.
        model_class: makes a second one, without weights.

    Returns:
        Names of the buffers that were wrong.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    loaded = dict(model.named_non_persistent_buffers())
    if not loaded or is_deepspeed_zero3_enabled():  # type: ignore[no-untyped-call]  # there __init__ runs as ever
        return []
    default = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)  # as during loading
    try:
        with no_init_weights(), init_empty_weights(include_buffers=False):  # type: ignore[no-untyped-call]
            computed = dict(model_class(copy.deepcopy(model.config)).named_non_persistent_buffers())
    finally:
        torch.set_default_dtype(default)
    wrong = [
        name
        for name, value in computed.items()
        if name in loaded and not (loaded[name].dtype == value.dtype and torch.equal(loaded[name], value))
    ]
    for name in wrong:
        owner, _, attribute = name.rpartition(".")
        module: nn.Module = model.get_submodule(owner)
        module._buffers[attribute] = computed[name].to(loaded[name].device)
    if wrong:
        logger.info("%s: %d buffers that no checkpoint holds were computed anew", type(model).__name__, len(wrong))
    return wrong


def _tied_to_embedding(model: Any, names: Any) -> dict[str, str]:
    embedding = model.get_input_embeddings().weight
    source = next(name for name, weight in model.named_parameters(remove_duplicate=False) if weight is embedding)
    return {str(name): source for name in names if name != source}
