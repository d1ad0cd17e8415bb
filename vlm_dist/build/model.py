"""The model of a run: loaded, given room for new tokens, its towers set to what is trained of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from vlm_dist.config import RunConfig
from vlm_dist.distributed.failures import agree_on_failure
from vlm_dist.distributed.group import Ranks
from vlm_dist.engine import zero_init_context
from vlm_dist.model import (
    attach_adapter,
    check_tokens_are_learned,
    compile_blocks,
    describe_trained,
    enable_gradient_checkpointing,
    format_tower_table,
    load_model,
    make_room_for_tokens,
    parse_dtype,
    quantization_arguments,
    run_frozen_towers_without_graph,
    tower_table,
)
from vlm_dist.model.attention.choice import attention_of, choose_attention, describe_varlen
from vlm_dist.model.attention.names import VARLEN


def make_model(
    config: RunConfig,
    ds_config: Mapping[str, Any],
    processor: Any,
    ranks: Ranks,
    report: Callable[[str], None],
    *,
    writes_description: bool = True,
) -> tuple[Any, int]:
    """Load the model, partitioned under ZeRO-3, and attach the adapter. Collective: every rank calls this.

    Args:
        config: of the run.
        ds_config: DeepSpeed's, as far as it is known before the model is.
        processor: knows which tokens are new; is written into the run's directory where some are.
        ranks: of the run.
        report: takes lines for people.
        writes_description: into the run's directory: what is trained, and a processor with new tokens.

    Returns:
        The model, and how many of its parameters are trained.

    Raises:
        ModelError: it cannot be loaded, or what is to be trained cannot be.
    """
    train = config.train
    towers, rates = config.peft.towers.model_dump(), config.peft.towers_learning_rate.model_dump()
    loading = config.model.loading_for(config.model_id).model_dump()
    loading |= quantization_arguments(config.peft.quantization, parse_dtype(train.precision))
    with zero_init_context(ds_config):
        model: Any = load_model(config.model_id, config.model_entry, loading, dtype=train.precision)
        attention = _attention(model, config)
        num_rows = make_room_for_tokens(model, processor.new_token_ids, train.seed)
        model = attach_adapter(model, config.peft, towers, seed=train.seed)
    if attention is not None:
        report(f"attention: {attention}")
    run_frozen_towers_without_graph(model)
    if train.gradient_checkpointing:
        recomputed = enable_gradient_checkpointing(model, **train.gradient_checkpointing_policy.model_dump())
        report(f"gradient checkpointing: {'; '.join(map(str, recomputed))}")
    if train.torch_compile:  # after all that changes what a block's call does
        compiled = compile_blocks(model, train.torch_compile_backend)
        report(f"torch.compile ({train.torch_compile_backend}): {'; '.join(map(str, compiled))}")
    table = tower_table(model, towers, train.learning_rate, rates)
    report(format_tower_table(table))
    with agree_on_failure(ranks):
        if processor.new_token_ids:
            new = processor.tokenizer.convert_ids_to_tokens(processor.new_token_ids)
            check_tokens_are_learned(model, new)
            report(f"{len(new)} new special tokens; the vocabulary has {num_rows} rows. The tokenizer is in processor/")
        if ranks.is_main and writes_description:
            if processor.new_token_ids:
                processor.save_pretrained(train.output_dir / "processor")
            (train.output_dir / "trained_modules.txt").write_text(describe_trained(model), encoding="utf-8")
    return model, table[-1].num_trainable


def _attention(model: Any, config: RunConfig) -> str | None:
    """Set the attention of packs; a line about it, where it has any choice."""
    train = config.train
    wanted = config.model.loading_for(config.model_id).attn_implementation
    reason = choose_attention(model, wanted, is_packed=train.packing, is_compiled=train.torch_compile)
    if reason is not None:
        return f"{attention_of(model)[0]}, with a mask between the samples of a pack ({reason})"
    if attention_of(model)[0] != VARLEN:
        return None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return describe_varlen(model, device, parse_dtype(train.precision))
