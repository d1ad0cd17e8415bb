"""Bytes that the backward needs of the forward, per token, derived block by block. Formulas: docs/estimate.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vlm_dist.model.attention.choice import attention_of
from vlm_dist.model.checkpointing import base_model, block_names
from vlm_dist.model.flop_parts import _SECOND, Attention, Product, model_parts


@dataclass
class BlockBytes:
    """What one block keeps for its backward.

    Attributes:
        tower: vision, projector or language.
        kept: stream -> bytes per token, if it is not computed again.
        kept_again: the same if it is: its input.
        scores: bytes per pair of tokens of a row that attention keeps: its mask, and where it is `eager` its scores.
        passing: stream -> bytes per token that a forward without graph has for a moment.
        gradients: stream -> bytes per token that its backward has for a moment beside what is kept.
        is_recomputed: as the model is set.
        has_graph: whether the backward comes here.
    """

    tower: str
    kept: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    kept_again: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    scores: float = 0.0
    passing: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    gradients: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    is_recomputed: bool = False
    has_graph: bool = False


def block_bytes(
    model: Any,
    element_bytes: int,
    dropout: float,
    dropped_bytes: int = 1,
    has_mask: bool = True,
    parts: tuple[Sequence[Product], Sequence[Attention]] | None = None,
) -> list[BlockBytes]:
    """What each block of a model keeps, in the order of the model; the norm before the head comes last.

    Args:
        model: with its adapter and gradient checkpointing; may be on the meta device.
        element_bytes: of an activation.
        dropout: of LoRA; above 0 each adapter keeps a copy of its input, and which elements were dropped.
        dropped_bytes: of the latter, for each element: 1 on GPUs, as many as an activation's on CPUs.
        has_mask: whether attention is given a mask: rows are padded, or packed where borders do not do.
        parts: of the model, if somebody has them: products and attentions, as a `FlopModel` does.
    """
    base = base_model(model)
    products, attentions = parts or model_parts(base)
    reader = _Reader(base, element_bytes, dropout, dropped_bytes, has_mask)
    names = frozenset(block_names(base))
    groups: dict[str, list[Product]] = {}
    for product in products:
        if product.tower != "head":
            groups.setdefault(_block_of(product.name, names) or f"rest of {product.tower}", []).append(product)
    at = {attention.name: attention for attention in attentions}
    made = [reader.read(name, some, at) for name, some in groups.items()]
    language = next(product for product in products if product.tower == "language")
    last = BlockBytes("language", has_graph=True)
    last.kept["language"] = 4.0 * language.in_features + 4  # the norm before the head
    return [*made, last]


def _block_of(name: str, blocks: frozenset[str]) -> str | None:
    """The block that a layer is in."""
    while name and name not in blocks:
        name = name.rpartition(".")[0]
    return name or None


class _Reader:
    def __init__(self, base: Any, element_bytes: int, dropout: float, dropped_bytes: int, has_mask: bool) -> None:
        self._base = base
        self._size = element_bytes
        self._dropout = dropout
        self._dropped = dropped_bytes
        self._has_mask = has_mask
        self._attention = attention_of(base)[0] or "eager"

    def read(self, block: str, products: list[Product], attentions: Mapping[str, Attention]) -> BlockBytes:
        made = BlockBytes(products[0].tower)
        made.has_graph = any(p.has_input_gradient or p.has_weight_gradient for p in products)
        is_block = not block.startswith("rest of ")
        if is_block:
            made.is_recomputed = bool(getattr(self._base.get_submodule(block), "gradient_checkpointing", False))
        stream = products[0].stream
        width = products[0].in_features
        groups: dict[str, list[Product]] = defaultdict(list)
        for product in products:
            groups[_layer(product).rpartition(".")[0]].append(product)
        widest = 0.0
        for parent, some in groups.items():
            widest = max(widest, sum(p.out_features for p in some if ".lora_" not in p.name))
            if made.has_graph:
                for of, count in self._of_group(parent, some, attentions).items():
                    made.kept[of] += count
                if parent in attentions and attentions[parent].has_backward:
                    made.scores += self._of_pairs(parent, attentions[parent])
        if made.has_graph and is_block:
            made.kept[stream] += self._of_norms(block, products, attentions)
            made.kept_again[stream] += self._size * width
        made.passing[stream] = self._size * (2 * width + 2 * widest)
        single = max(p.out_features for p in products if ".lora_" not in p.name)
        made.gradients[stream] = self._size * (2.0 * width + single)
        return made

    def _of_group(self, parent: str, products: list[Product], attentions: Mapping[str, Attention]) -> dict[str, float]:
        """Layers with one parent: an attention, an MLP, or something else."""
        kept: dict[str, float] = defaultdict(float)
        plain = [product for product in products if ".lora_" not in product.name]
        adapted = {_layer(product) for product in products if ".lora_" in product.name}
        shared: set[tuple[str, int]] = set()
        for product in products:
            if ".lora_A." in product.name:
                if self._dropout > 0:
                    kept[product.stream] += (self._size + self._dropped) * product.in_features
                elif not (parent in attentions and _layer(product).rpartition(".")[2] in _SECOND):
                    shared.add((product.stream, product.in_features))  # what attention gives is kept there
                kept[product.stream] += self._size * product.out_features
        for product in plain:
            if product.has_weight_gradient and not (
                parent in attentions and product.name.rpartition(".")[2] in _SECOND
            ):
                shared.add((product.stream, product.in_features))
        for stream, width in shared:
            kept[stream] += self._size * width
        runs = any(p.has_input_gradient or p.has_weight_gradient for p in products)
        if parent in attentions:
            if attentions[parent].has_backward:
                kept[plain[0].stream] += self._of_attention(parent, plain)
        elif runs and len(plain) > 1:
            kept[plain[0].stream] += self._of_mlp(parent, plain)
        elif runs and adapted and not plain[0].has_input_gradient:
            pass
        return kept

    def _of_attention(self, parent: str, plain: list[Product]) -> float:
        """Query, key, value, what comes out, and its normalisers."""
        width = max(p.in_features for p in plain if p.name.rpartition(".")[2] in _SECOND or len(plain) == 1)
        joined = any(p.name.rpartition(".")[2] in ("qkv", "qkv_proj") for p in plain)
        # values are a view of what is joined; keys and values of fewer heads are repeated
        return self._size * width * (6.0 if joined else 4.0) + 4.0 * self._heads(parent)

    def _of_pairs(self, parent: str, attention: Attention) -> float:
        """Bytes for each pair of tokens of a row."""
        if attention.kind != "causal" or "flash" in self._attention:
            return 0.0
        mask = float(self._size) if self._has_mask else 0.0
        if self._attention == "eager":
            return mask + self._heads(parent) * (2 * self._size + 4)
        return mask

    def _of_mlp(self, parent: str, plain: list[Product]) -> float:
        """The activation's input and output, and the other factor of a gated one."""
        inner = max(product.out_features for product in plain)
        ends = {product.name.rpartition(".")[2] for product in plain}
        if "up_proj" in ends and "gate_proj" in ends:
            return 3.0 * self._size * inner
        if "gate_up_proj" in ends:
            return 2.5 * self._size * inner
        module = self._base.get_submodule(parent)
        names = " ".join(type(child).__name__.lower() for child in module.modules())
        return (3.0 if "quick" in names else 1.0) * self._size * plain[0].out_features

    def _of_norms(self, block: str, products: list[Product], attentions: Mapping[str, Attention]) -> float:
        """A layer norm keeps its input; an RMS norm its input in float32."""
        total = 0.0
        heads = {p.name.rpartition(".")[2]: p.out_features for p in products}
        for name, module in self._base.get_submodule(block).named_modules():
            if "norm" not in type(module).__name__.lower() or not any(True for _ in module.parameters(recurse=False)):
                continue
            weight = next(module.parameters(recurse=False))
            width = int(getattr(weight, "ds_shape", weight.shape)[-1])
            if name.endswith(("q_norm", "k_norm")):
                width = heads.get("q_proj" if name.endswith("q_norm") else "k_proj", width)
            size = self._size if isinstance(module, nn.LayerNorm) else 4
            total += (
                size * width
                + (4 if size == 4 else 0)
                + (self._size * width if weight.requires_grad and size == 4 else 0)
            )
        return total

    def _heads(self, parent: str) -> int:
        module: Any = self._base.get_submodule(parent)
        for place in (module, getattr(module, "config", None)):
            for name in ("num_heads", "num_attention_heads"):
                if isinstance(count := getattr(place, name, None), int):
                    return count
        return 1


def _layer(product: Product) -> str:
    return product.name.split(".lora_", 1)[0]
