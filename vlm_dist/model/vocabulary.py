"""New special tokens: in the tokenizer, in the embeddings, and among what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vlm_dist.errors import ModelError
from vlm_dist.model.gathering import gathered

#: Of a new row around the mean of all rows, as a share of a row's own spread: rows must differ to be told apart.
_NOISE = 0.1


def add_special_tokens(processor: Any, tokens: Sequence[str]) -> None:
    """Add tokens that are never split. Decoded answers keep them, as they are part of what is said.

    Args:
        processor: is changed; its `new_token_ids` are the ids of those that the tokenizer did not have.
        tokens: as they stand in texts.
    """
    from transformers import AddedToken

    tokenizer = getattr(processor, "tokenizer", processor)
    known = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in new])
    processor.new_token_ids = tokenizer.convert_tokens_to_ids(new)


def make_room_for_tokens(model: Any, new_token_ids: Sequence[int], seed: int = 0) -> int:
    """Give new tokens a row of their own in the embeddings and the head. Collective under ZeRO-3.

    Many checkpoints have spare rows; the matrices grow only where these do not reach. New rows are the mean of all rows
    with a little noise that depends on the seed alone, so that they are the same on every rank and at any ZeRO stage.

    Args:
        model: without adapter; is changed.
        new_token_ids: of the tokenizer.
        seed: of the noise.

    Returns:
        How many rows there are now.
    """
    rows = _num_rows(model.get_input_embeddings())
    if not new_token_ids:
        return rows
    needed = max(new_token_ids) + 1
    if needed > rows:
        model.resize_token_embeddings(needed, mean_resizing=False)
    for weight in {id(weight): weight for weight in _vocabulary_weights(model)}.values():  # once where they are tied
        with gathered(weight), torch.no_grad():
            if weight.numel() == 0:
                continue  # partitioned, and another rank sets it
            old = weight[: min(new_token_ids)].float()
            spread = old.std(dim=0)
            for token_id in new_token_ids:
                noise = torch.randn(spread.shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + token_id))
                row = old.mean(dim=0) + _NOISE * spread * noise.to(spread.device)
                weight[token_id] = row.to(weight.dtype)
    return max(rows, needed)


def check_tokens_are_learned(model: Any, tokens: Sequence[str]) -> None:
    """Check that the rows of new tokens are trained, and so saved with the adapter.

    Args:
        model: with its adapter.
        tokens: that are new.

    Raises:
        ModelError: with what to set.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    frozen = {id(weight) for weight in _vocabulary_weights(base) if not weight.requires_grad}
    if not tokens or not frozen:
        return
    parameters = base.named_parameters(remove_duplicate=False)
    names = sorted({name.split(".")[-2] for name, weight in parameters if id(weight) in frozen})
    raise ModelError(
        f"processor_params.new_special_tokens: {', '.join(tokens)} would never be learned, as {' and '.join(names)} "
        f"is frozen; set peft.modules_to_save: [{', '.join(names)}] (or towers.language: full)"
    )


def _vocabulary_weights(model: Any) -> list[nn.Parameter]:
    """Of the embeddings and the head."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [layer.weight for layer in layers if layer is not None]


def _num_rows(embeddings: Any) -> int:
    weight = embeddings.weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])
