"""The model of a run on the meta device: real classes, real LoRA placement, no weights."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from vlm_dist.config import RunConfig
from vlm_dist.errors import ModelError
from vlm_dist.model import attach_adapter, parse_dtype, run_frozen_towers_without_graph
from vlm_dist.model.attention.choice import choose_attention
from vlm_dist.model.attention.names import VARLEN
from vlm_dist.model.checkpoint_files import read_json
from vlm_dist.model.conversion import converter_of, native_directory
from vlm_dist.model.patch_embedding import use_matrix_products
from vlm_dist.model.registry import resolve_class
from vlm_dist.model.towers import find_towers


def meta_model(config: RunConfig) -> Any:
    """The model, with its adapter, its frozen towers without graph, and gradient checkpointing off.

    Args:
        config: of the run; of the checkpoint the config.json alone is read.

    Raises:
        ModelError: it cannot be made without its weights, or what is to be trained cannot be.
    """
    loading = config.model.loading_for(config.model_id)
    model_id, revision = config.model_id, loading.revision
    facts = read_json(model_id, "config.json", revision)
    if not facts:
        raise ModelError(f"{model_id}: its config.json cannot be read; that file is needed, and no weights")
    model_class: Any = resolve_class(
        config.model_entry, "model_class", model_id, trust_remote_code=loading.trust_remote_code, revision=revision
    )
    if (converter := converter_of(facts.get("model_type"))) is not None:
        import transformers

        model_class = getattr(transformers, converter.model_class)
        model_id, revision = native_directory(converter, model_id, revision, weights=False), None
    model = _without_weights(model_class, model_id, config, revision)
    use_matrix_products(model)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = attach_adapter(model, config.peft, config.peft.towers.model_dump(), seed=config.train.seed)
    run_frozen_towers_without_graph(adapted)
    return adapted


def _without_weights(model_class: Any, model_id: str, config: RunConfig, revision: str | None) -> Any:
    from transformers import AutoConfig

    loading = config.model.loading_for(config.model_id)
    try:
        facts = AutoConfig.from_pretrained(
            model_id, revision=revision or "main", trust_remote_code=loading.trust_remote_code
        )
        make = getattr(model_class, "_from_config", None) or model_class.from_config
        arguments: dict[str, Any] = {"dtype": parse_dtype(config.train.precision)}
        if loading.attn_implementation is not None:
            arguments["attn_implementation"] = _on_any_machine(loading.attn_implementation)
        with torch.device("meta"):
            model = make(facts, **arguments)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{config.model_id}: it cannot be made from its config.json alone: {error}") from error
    _name_attention(model, loading.attn_implementation)
    choose_attention(
        model, loading.attn_implementation, is_packed=config.train.packing, is_compiled=config.train.torch_compile
    )
    return model


def _name_attention(model: Any, implementation: str | None) -> None:
    """What the figures go by, where it cannot be set here."""
    if implementation is None or implementation == VARLEN:
        return
    vision = [model.get_submodule(root) for root in find_towers(model)["vision"]]
    for config in (model.config, model.config.get_text_config(), *(getattr(one, "config", None) for one in vision)):
        if config is not None:
            config._attn_implementation_internal = implementation


def _on_any_machine(implementation: str) -> str:
    """Flash attention cannot be asked for without a GPU; what it does is known without it."""
    return "sdpa" if "flash" in implementation or implementation == VARLEN else implementation
