"""Model classes, loading, towers, LoRA and gradient checkpointing.

Exports are lazy: `vlm_dist.model` can be imported before the processor room needs torch and transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_dist.model.checkpointing import enable_gradient_checkpointing
    from vlm_dist.model.loading import load_model, load_processor, parse_dtype
    from vlm_dist.model.lora import attach_adapter, format_tower_table, tower_table
    from vlm_dist.model.positions import load_rope_index
    from vlm_dist.model.registry import ModelClasses, resolve_classes
    from vlm_dist.model.towers import Towers, find_towers

_HOMES = {
    "ModelClasses": "registry",
    "Towers": "towers",
    "attach_adapter": "lora",
    "enable_gradient_checkpointing": "checkpointing",
    "find_towers": "towers",
    "format_tower_table": "lora",
    "load_model": "loading",
    "load_processor": "loading",
    "load_rope_index": "positions",
    "parse_dtype": "loading",
    "resolve_classes": "registry",
    "tower_table": "lora",
}

__all__ = [
    "ModelClasses",
    "Towers",
    "attach_adapter",
    "enable_gradient_checkpointing",
    "find_towers",
    "format_tower_table",
    "load_model",
    "load_processor",
    "load_rope_index",
    "parse_dtype",
    "resolve_classes",
    "tower_table",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
