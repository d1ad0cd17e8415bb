"""Model classes, loading, towers, LoRA, gradient checkpointing and compiled blocks.

Exports are lazy: `vlm_dist.model` can be imported before the processor room needs torch and transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_dist.model.checkpointing import enable_gradient_checkpointing, run_frozen_towers_without_graph
    from vlm_dist.model.compilation import check_compilation, compile_blocks, try_compiler
    from vlm_dist.model.loading import load_model, load_processor, parse_dtype, prepare_checkpoint
    from vlm_dist.model.lora import attach_adapter
    from vlm_dist.model.positions import load_rope_index
    from vlm_dist.model.quantization import check_quantization, quantization_arguments
    from vlm_dist.model.registry import ModelClasses, resolve_classes
    from vlm_dist.model.towers import Towers, find_towers
    from vlm_dist.model.trained import describe_trained, format_tower_table, tower_namer, tower_rates, tower_table
    from vlm_dist.model.vocabulary import check_tokens_are_learned, make_room_for_tokens

_HOMES = {
    "ModelClasses": "registry",
    "Towers": "towers",
    "attach_adapter": "lora",
    "check_compilation": "compilation",
    "check_quantization": "quantization",
    "check_tokens_are_learned": "vocabulary",
    "compile_blocks": "compilation",
    "describe_trained": "trained",
    "enable_gradient_checkpointing": "checkpointing",
    "find_towers": "towers",
    "format_tower_table": "trained",
    "load_model": "loading",
    "load_processor": "loading",
    "load_rope_index": "positions",
    "make_room_for_tokens": "vocabulary",
    "parse_dtype": "loading",
    "prepare_checkpoint": "loading",
    "quantization_arguments": "quantization",
    "resolve_classes": "registry",
    "run_frozen_towers_without_graph": "checkpointing",
    "tower_namer": "trained",
    "tower_rates": "trained",
    "tower_table": "trained",
    "try_compiler": "compilation",
}

__all__ = [
    "ModelClasses",
    "Towers",
    "attach_adapter",
    "check_compilation",
    "check_quantization",
    "check_tokens_are_learned",
    "compile_blocks",
    "describe_trained",
    "enable_gradient_checkpointing",
    "find_towers",
    "format_tower_table",
    "load_model",
    "load_processor",
    "load_rope_index",
    "make_room_for_tokens",
    "parse_dtype",
    "prepare_checkpoint",
    "quantization_arguments",
    "resolve_classes",
    "run_frozen_towers_without_graph",
    "tower_namer",
    "tower_rates",
    "tower_table",
    "try_compiler",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
