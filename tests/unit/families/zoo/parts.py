"""What the tiny checkpoints are made of: tokenizers, and the sizes of their towers."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

#: Of every language model here.
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}
#: Of every vision tower here.
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def byte_tokenizer(special: tuple[str, ...] = (), **named: str) -> PreTrainedTokenizerFast:
    """One token per byte, and special tokens.

    Args:
        special: tokens without a name.
        **named: `bos_token`, `eos_token` and `pad_token`; any other name is one that processors ask for, such as
            `image_token`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    common = {name: named.pop(name) for name in ("bos_token", "eos_token", "pad_token") if name in named}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learner, extra_special_tokens=named, **common)
    tokenizer.add_tokens(list(special), special_tokens=True)
    return tokenizer


def text_ids(tokenizer: Any) -> dict[str, Any]:
    """The part of a language model's config that the tokenizer decides."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def token_id(tokenizer: Any, token: str) -> int:
    """The id of a token that there must be."""
    (found,) = tokenizer(token, add_special_tokens=False)["input_ids"]
    return int(found)


def with_random_weights(model: Any, seed: int = 0) -> Any:
    """Weights large enough for attention to matter: those of a fresh model hardly tell one token from another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                scale = 1.0 if "embed_tokens" in name else parameter[0].numel() ** -0.5
                parameter.normal_(0.0, scale, generator=generator)
            elif "norm" not in name:
                parameter.normal_(0.0, 0.1, generator=generator)
    return model.eval()
