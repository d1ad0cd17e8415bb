"""Weights of InternVLChatModel under the names and in the layout of transformers' InternVLForConditionalGeneration."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlm_dist.errors import ModelError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What becomes of a stored tensor, or of a part of it.

    Attributes:
        name: of the native weight.
        shape: of it.
        cut: takes it out of the stored tensor.
    """

    name: str
    shape: Shape
    cut: Callable[[Tensor], Tensor]


#: Beginnings of names, in the order in which they are tried.
_PREFIXES = (
    ("vision_model.", "model.vision_tower."),
    ("language_model.model.", "model.language_model."),
    ("language_model.", ""),
    ("mlp1.", "model.multi_modal_projector."),
)
_VISION = {
    r"^embeddings\.class_embedding$": "embeddings.cls_token",
    r"^embeddings\.position_embedding$": "embeddings.position_embeddings",
    r"^embeddings\.patch_embedding\.": "embeddings.patch_embeddings.projection.",
    r"^encoder\.layers\.": "encoder.layer.",
    r"\.ls([12])$": r".lambda_\1",
    r"\.attn\.proj\.": ".attention.projection_layer.",
    r"\.attn\.": ".attention.",
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
}
_PROJECTOR = {r"^0\.": "layer_norm.", r"^1\.": "linear_1.", r"^3\.": "linear_2."}
_INTERNLM2 = {
    r"^tok_embeddings\.": "embed_tokens.",
    r"^output\.": "lm_head.",
    r"\.attention\.wo\.": ".self_attn.o_proj.",
    r"\.attention\.wqkv\.": ".self_attn.wqkv.",
    r"\.feed_forward\.w1\.": ".mlp.gate_proj.",
    r"\.feed_forward\.w2\.": ".mlp.down_proj.",
    r"\.feed_forward\.w3\.": ".mlp.up_proj.",
    r"\.attention_norm\.": ".input_layernorm.",
    r"\.ffn_norm\.": ".post_attention_layernorm.",
}
#: Language model's class -> what is renamed; none: its names and its layout are the native ones.
_LANGUAGE: Mapping[str, Mapping[str, str]] = {
    "InternLM2ForCausalLM": _INTERNLM2,
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Phi3ForCausalLM": {},
}


def native_parts(name: str, shape: Shape, language: str, text_config: Any) -> list[Part]:
    """What a stored tensor becomes.

    Args:
        name: of the stored tensor.
        shape: of it.
        language: class of the language model.
        text_config: of the native language model; tells the number of heads.

    Raises:
        ModelError: no weight of an InternVLChatModel has such a name.
    """
    old, new = next(((old, new) for old, new in _PREFIXES if name.startswith(old)), (None, ""))
    if old is None:
        raise ModelError(
            f"the checkpoint has a weight {name}, which is no part of an InternVLChatModel. If it was made by LoRA, "
            "merge the adapter into the model before it is saved."
        )
    tables = {"vision_model.": _VISION, "mlp1.": _PROJECTOR}
    renamed = name.removeprefix(old)
    for pattern, replacement in tables.get(old, _LANGUAGE[language]).items():
        renamed = re.sub(pattern, replacement, renamed)
    renamed = new + renamed
    if ".attention.qkv." in renamed:
        return _equal_thirds(renamed, shape)
    if ".self_attn.wqkv." in renamed:
        return _grouped(renamed, shape, text_config.num_attention_heads, text_config.num_key_value_heads)
    return [Part(renamed, shape, lambda stored: stored)]


def _equal_thirds(name: str, shape: Shape) -> list[Part]:
    """The vision tower's projection: all queries, all keys, all values below each other."""
    rows = shape[0] // 3

    def third(index: int) -> Callable[[Tensor], Tensor]:
        return lambda stored: stored[index * rows : (index + 1) * rows]

    return [
        Part(name.replace(".qkv.", f".{part}_proj."), (rows, *shape[1:]), third(index))
        for index, part in enumerate("qkv")
    ]


def _grouped(name: str, shape: Shape, num_heads: int, num_groups: int) -> list[Part]:
    """InternLM2's projection: for each key-value head its queries, its key and its value below each other."""
    queries = num_heads // num_groups
    dim = shape[0] // (num_groups * (queries + 2))

    def rows(first: int, last: int) -> Callable[[Tensor], Tensor]:
        def cut(stored: Tensor) -> Tensor:
            grouped = stored.view(num_groups, queries + 2, dim, *shape[1:])
            return grouped[:, first:last].reshape(-1, *shape[1:])

        return cut

    return [
        Part(
            name.replace(".wqkv.", f".{part}_proj."), (num_groups * (last - first) * dim, *shape[1:]), rows(first, last)
        )
        for part, first, last in (("q", 0, queries), ("k", queries, queries + 1), ("v", queries + 1, queries + 2))
    ]
