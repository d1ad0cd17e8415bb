"""How answers are generated: greedily, and to the tokens that the model was taught to end with."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from vlm_dist.errors import ModelError


def greedy_config(model: Any, tokenizer: Any, max_new_tokens: int) -> Any:
    """Greedy decoding, whatever the checkpoint's own generation_config says.

    Args:
        model: of transformers, without wrappers.
        tokenizer: of the model; None is refused.
        max_new_tokens: length limit of an answer.

    Raises:
        ModelError: the model cannot generate.
    """
    from transformers import GenerationConfig

    if not hasattr(model, "generate") or tokenizer is None:
        raise ModelError(
            f"train.predict_with_generate: {type(model).__name__} cannot generate; set it to false "
            "to evaluate by the loss alone"
        )
    own = model.generation_config
    eos = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    ends = [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]
    pad = next((i for i in (own.pad_token_id, tokenizer.pad_token_id, *ends) if i is not None), None)
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=None,
        max_new_tokens=max_new_tokens,
        bos_token_id=own.bos_token_id,
        eos_token_id=ends or None,
        pad_token_id=pad,
        use_cache=own.use_cache is not False,  # in training it is off; here only where a model cannot
    )


def also_end_with(config: Any, tokens: Collection[int]) -> None:
    """Let generation end with these tokens, too."""
    config.eos_token_id = sorted({*(config.eos_token_id or ()), *tokens}) or None


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of tokens that are no text."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def learned_ends(labels: Tensor, special: Collection[int], ignore_index: int) -> set[int]:
    """The special tokens that labels end with: what the model learns to end its answer with.

    A checkpoint's generation_config need not have them: base models end with another token than a chat template.

    Args:
        labels: [B, T].
        special: ids that may be an end.
        ignore_index: the label of tokens without loss.
    """
    ends = set()
    for row in labels:
        last = row[row != ignore_index][-2:].tolist()  # a template may put a line break behind the token
        ends |= set([token for token in last if token in special][-1:])
    return ends
