"""The borders of samples, from the inputs of a model to the layers of its language model, and nowhere else.

Vision towers are given the keyword arguments of the whole model, too, and would take the borders of samples for those
of pictures. So a hook takes them away where the model begins, and another hands them to its language model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vlm_dist.model.attention.names import CU_SEQ_LENS, MAX_SEQ_LEN, VARLEN
from vlm_dist.model.towers import find_towers


@dataclass
class Row:
    """What is being computed now, for what is called without being told.

    Attributes:
        is_told: the language model's layers are given the borders: it needs no mask.
    """

    is_told: bool = False


#: Of this process: one model computes at a time.
ROW = Row()


@dataclass
class _Hooks:
    """Of one model.

    Attributes:
        reads_borders: whether the language model's attention does, by what it is set to now.
        borders: keyword arguments for its layers, while a pack is computed.
    """

    reads_borders: Callable[[], bool]
    borders: dict[str, Any] = field(default_factory=dict)

    def take(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the model."""
        cu_seq_lens, longest = kwargs.pop(CU_SEQ_LENS, None), kwargs.pop(MAX_SEQ_LEN, None)
        self.borders = {}
        if cu_seq_lens is not None and kwargs.get("attention_mask") is None and self.reads_borders():
            self.borders = {
                "cu_seq_lens_q": cu_seq_lens,
                "cu_seq_lens_k": cu_seq_lens,
                "max_length_q": longest,
                "max_length_k": longest,
            }
        return args, kwargs

    def hand_on(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the language model."""
        ROW.is_told = bool(self.borders)
        return args, kwargs | self.borders

    def forget(self, module: nn.Module, args: Any, output: Any) -> None:
        """Behind the language model, also where it failed."""
        ROW.is_told = False
        self.borders = {}


def install(model: Any) -> None:
    """Take the borders of packs to the attention of a model's layers, if it reads them. Others never see them.

    Args:
        model: a transformers model, without adapter.
    """
    from transformers.utils.generic import is_flash_attention_requested

    from vlm_dist.model.attention.interface import leave_rows_unsearched

    language = model.get_submodule(find_towers(model)["language"][0])
    config = model.config.get_text_config()

    def reads_borders() -> bool:
        return config._attn_implementation == VARLEN or is_flash_attention_requested(config)

    hooks = _Hooks(reads_borders)
    leave_rows_unsearched()
    model.register_forward_pre_hook(hooks.take, with_kwargs=True)
    language.register_forward_pre_hook(hooks.hand_on, with_kwargs=True)
    language.register_forward_hook(hooks.forget, always_call=True)
