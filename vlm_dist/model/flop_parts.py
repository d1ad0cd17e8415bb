"""The matrix products and attentions of a model: how large, on which tokens, with which gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vlm_dist.model.checkpointing import block_names
from vlm_dist.model.towers import Towers, find_towers, is_within, tower_of, without_gradient

#: Layers that read what their siblings made, rather than what these read.
_SECOND = (
    "o_proj", "out_proj", "proj", "projection_layer", "dense", "down_proj", "fc2", "linear_2", "linear_fc2", "wo", "w2"
)  # fmt: skip
#: Children of a block whose names say that something with a gradient follows the last layer.
_BEHIND_LAST = ("post_feedforward", "post_mlp", "lambda", "layer_scale")


@dataclass(frozen=True)
class Product:
    """A matrix product with weights.

    Attributes:
        name: of the layer.
        stream: whose tokens it sees: "language", "head", or one of `VisualTokens.streams`.
        tower: vision, projector, language or head.
        weights: number of them, which a token meets.
        has_input_gradient: something before it is trained.
        has_weight_gradient: it is trained.
        is_recomputed: in the backward.
        out_features: of what it makes.
        in_features: of what it reads.
        num_forwards: how often it is computed, each time over other inputs: twice where DoRA has dropout.
        extra_flops: of each forward, whatever the tokens: DoRA multiplies LoRA's two matrices for its norms.
    """

    name: str
    stream: str
    tower: str
    weights: float
    has_input_gradient: bool
    has_weight_gradient: bool
    is_recomputed: bool = False
    out_features: int = 0
    in_features: int = 0
    num_forwards: int = 1
    extra_flops: float = 0.0

    @property
    def model_flops(self) -> float:
        """Per token, forward and backward."""
        return 2.0 * self.weights * (1 + self.has_input_gradient + self.has_weight_gradient)

    @property
    def hardware_flops(self) -> float:
        """Per token, with what is computed again."""
        each = 1 + self.has_input_gradient + self.is_recomputed
        return 2.0 * self.weights * (each * self.num_forwards + self.has_weight_gradient)

    @property
    def hardware_flops_beside_tokens(self) -> float:
        """Of a micro-batch, however many tokens it has."""
        return self.extra_flops * (1 + self.is_recomputed)


@dataclass(frozen=True)
class Attention:
    """The two products of a layer's attention, without weights.

    Attributes:
        name: of the module.
        kind: "causal" in the language model; "full" over a picture (or a frame), or "window" over a part of it;
            "latents": a few queries over a picture.
        width: of all heads together.
        window: of a causal one that looks back no further.
        has_backward: what it reads has a gradient.
        is_recomputed: in the backward.
    """

    name: str
    kind: str
    width: int
    window: int | None
    has_backward: bool
    is_recomputed: bool


@dataclass
class _Layer:
    """A layer with weights; with LoRA it is several products."""

    name: str
    module: Any
    tower: str

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def is_second(self) -> bool:
        return self.name.rpartition(".")[2] in _SECOND

    @property
    def core(self) -> Any:
        return getattr(self.module, "base_layer", self.module)

    @property
    def is_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.module.parameters())

    @property
    def sizes(self) -> tuple[int, int]:
        """Inputs and outputs, whatever became of the weight."""
        core = self.core
        if isinstance(core, nn.Linear):
            return core.in_features, core.out_features
        if isinstance(core, nn.modules.conv._ConvNd):
            return core.in_channels // core.groups * math.prod(core.kernel_size), core.out_channels
        return int(core.nx), int(core.nf)  # transformers' Conv1D


def model_parts(base: Any) -> tuple[tuple[Product, ...], tuple[Attention, ...]]:
    """What a transformers model computes, tower by tower.

    Args:
        base: the model, with adapters in its layers where it has some; on any device, in any form.
    """
    return _Walk(base).parts()


class _Walk:
    """Follows the gradient from what is trained first to the end."""

    def __init__(self, base: Any) -> None:
        self._base = base
        self._towers: Towers = find_towers(base)
        self._unread = without_gradient(base, self._towers)
        self._blocks = frozenset(block_names(base))
        self._products: list[Product] = []
        self._attentions: list[Attention] = []
        self._layers = list(_layers(base, self._towers))
        self._loose = self._trained_beside_layers()
        self._width = next((l.sizes[1] for l in self._layers if l.tower == "vision"), 0)  # noqa: E741

    def parts(self) -> tuple[tuple[Product, ...], tuple[Attention, ...]]:
        graph = False
        for tower in ("vision", "projector", "language", "head"):
            graph = self._tower(tower, [layer for layer in self._layers if layer.tower == tower], graph)
        return tuple(self._products), tuple(self._attentions)

    def _tower(self, tower: str, layers: Sequence[_Layer], graph: bool) -> bool:
        """Count a tower; whether what comes out of it has a gradient."""
        loose = self._loose.get(tower, {})
        streams = self._projector_streams(layers) if tower == "projector" else {}
        blocks_begun: set[str] = set()
        is_first = True
        for parent, group in _by_parent(layers):
            block = self._block_of(parent)
            if block is None:
                graph = graph or bool(loose.get(""))
            elif block not in blocks_begun:
                blocks_begun.add(block)
                graph = graph or bool(loose.get("")) or bool(loose.get(block))
            is_read = not is_within(parent, self._unread)
            again = self._is_recomputed(block) and is_read
            graph_in = graph and is_read
            first = [layer for layer in group if not layer.is_second]
            second = [layer for layer in group if layer.is_second]
            if not first:
                first, second = second, []
            made = graph_in or (is_read and any(layer.is_trained for layer in first))
            for layer in first:
                stream = streams.get(layer.name) or self._stream(layer, is_first)
                self._add(layer, stream, graph_in and not (is_first and tower == "vision"), again)
                is_first = False
                if tower == "projector" and self._is_chain(parent):
                    graph_in = graph_in or layer.is_trained
            self._attend(parent, tower, [*second, *first], made, again)
            for layer in second:
                self._add(layer, streams.get(layer.name) or self._stream(layer, False), made, again)
                made = made or layer.is_trained
            made = made or graph_in
            if is_read:
                graph = made
            if again and block is not None:
                self._forget_last(block)
        graph = graph or bool(loose)
        self._bare_weights(tower, graph)
        return graph

    def _is_chain(self, parent: str) -> bool:
        """Layers one after the other, rather than beside each other."""
        return isinstance(self._base.get_submodule(parent), nn.Sequential)

    def _add(self, layer: _Layer, stream: str, has_input_gradient: bool, again: bool) -> None:
        inputs, outputs = layer.sizes
        trained = bool(layer.core.weight.requires_grad)
        made = Product(
            layer.name, stream, layer.tower, float(inputs) * outputs, has_input_gradient, trained, again,
            outputs, inputs,
        )  # fmt: skip
        if layer.tower == "head":
            # as vlm_dist.loss.labelled has it, which is another room
            again = stream == "head" and (trained or layer.core.weight.dtype == torch.float16)
            made = replace(made, has_input_gradient=True, is_recomputed=again)
        if not hasattr(layer.module, "lora_A"):
            self._products.append(made)
            return
        doras = [name for name in layer.module.lora_A if name in layer.module.lora_magnitude_vector]
        ranks = {
            name: matrix.out_features if isinstance(matrix, nn.Linear) else matrix.out_channels
            for name, matrix in layer.module.lora_A.items()
        }
        dropped = [name for name in doras if not isinstance(layer.module.lora_dropout[name], nn.Identity)]
        norms = sum(2.0 * inputs * ranks[name] * (inputs + outputs) for name in doras)  # A and B of a unit matrix
        self._products.append(replace(made, num_forwards=1 + len(dropped), extra_flops=norms))
        for name, matrix in layer.module.lora_A.items():
            rank = ranks[name]
            is_trained = any(parameter.requires_grad for parameter in matrix.parameters())
            down = replace(
                made, name=f"{layer.name}.lora_A.{name}", weights=float(inputs) * rank, has_weight_gradient=is_trained,
                out_features=rank,
            )  # fmt: skip
            up = replace(
                down, name=f"{layer.name}.lora_B.{name}", weights=float(rank) * outputs, has_input_gradient=True,
                in_features=rank, out_features=outputs,
            )  # fmt: skip
            self._products += [down, up]

    def _forget_last(self, block: str) -> None:
        """Computing again stops with what the backward needs: the block's last product is not needed."""
        children = [name for name, _ in self._base.get_submodule(block).named_children()]
        children += [name for name, _ in self._base.get_submodule(block).named_parameters(recurse=False)]
        if any(name.startswith(_BEHIND_LAST) for name in children):
            return
        inside = [number for number, product in enumerate(self._products) if is_within(product.name, (block,))]
        for number in inside[:-1]:  # the last of an earlier group of the same block was none
            product = self._products[number]
            if not product.is_recomputed:
                self._products[number] = replace(product, is_recomputed=True)
        self._products[inside[-1]] = replace(self._products[inside[-1]], is_recomputed=False)

    def _is_recomputed(self, block: str | None) -> bool:
        return block is not None and bool(getattr(self._base.get_submodule(block), "gradient_checkpointing", False))

    def _attend(self, parent: str, tower: str, layers: Sequence[_Layer], made: bool, again: bool) -> None:
        name = parent.rpartition(".")[2].lower()
        if not layers or not ("attn" in name or "attention" in name):
            return
        module = self._base.get_submodule(parent)
        width = layers[0].sizes[0]  # of the product that reads the heads
        window = getattr(module, "sliding_window", None)
        if tower == "language":
            kind = "causal"
        elif tower == "projector":
            kind = "latents"
        else:
            kind = "window" if self._has_windows(parent) else "full"
        if not isinstance(module, nn.MultiheadAttention):
            looks_back = window if isinstance(window, int) and tower == "language" else None
            self._attentions.append(Attention(parent, kind, width, looks_back, made, again))

    def _has_windows(self, parent: str) -> bool:
        """Whether a layer of the vision tower sees a window alone, as most of Qwen2.5-VL's."""
        config = getattr(self._base.config, "vision_config", None)
        full = getattr(config, "fullatt_block_indexes", None)
        if full is None or not getattr(config, "window_size", None):
            return False
        number = next((int(part) for part in reversed(parent.split(".")) if part.isdigit()), None)
        return number is not None and number not in full

    def _stream(self, layer: _Layer, is_first: bool) -> str:
        if layer.tower == "vision":
            pools = is_within(
                layer.name, [name for name in self._unread if name.rsplit(".", 1)[-1] in ("head", "pooler")]
            )
            return "images" if pools else ("pixels" if is_first else "patches")
        if layer.tower == "head":
            plain = type(layer.core).forward is nn.Linear.forward
            return "head" if plain else "language"
        return "language"

    def _projector_streams(self, layers: Sequence[_Layer]) -> dict[str, str]:
        """Layer -> features that it sees: a root's first layer tells how many are merged."""
        roots: dict[str, str] = {}
        found: dict[str, str] = {}
        for layer in layers:
            root = next((r for r in self._towers["projector"] if is_within(layer.name, (r,))), "")
            parts = layer.name[len(root) :].strip(".").split(".")
            if root.endswith("_list"):
                root = f"{root}.{parts[0]}"  # each merges for itself
            if isinstance(layer.core, nn.modules.conv._ConvNd):
                merged = math.prod(layer.core.kernel_size)
                roots = dict.fromkeys([*roots, *self._towers["projector"]], _merged(merged))
                found = dict.fromkeys(found, _merged(merged))
            elif root not in roots:
                roots[root] = _merged(self._merge_factor(layer.sizes[0]))
            found[layer.name] = roots[root]
            if "perceiver_resampler" in layer.name:
                end = layer.name.rpartition(".")[2]
                found[layer.name] = "latents and features" if end in ("k_proj", "v_proj") else "latents"
        return found

    def _merge_factor(self, in_features: int) -> int:
        chosen = getattr(self._base.config, "vision_feature_layer", None)
        layers = 1 if chosen is None or isinstance(chosen, int) else len(chosen)
        ratio, rest = divmod(in_features, max(1, self._width * layers))
        return ratio if not rest and ratio > 1 and math.isqrt(ratio) ** 2 == ratio else 1

    def _trained_beside_layers(self) -> dict[str, dict[str, bool]]:
        """Tower -> block (or "" for what is in none) -> whether a norm, an embedding or the like is trained in it."""
        inside = {id(p) for layer in self._layers for p in layer.module.parameters()}
        found: dict[str, dict[str, bool]] = {}
        for name, parameter in self._base.named_parameters():
            if not parameter.requires_grad or id(parameter) in inside or is_within(name, self._unread):
                continue
            tower, block = tower_of(name, self._towers), self._block_of(name) or ""
            if tower == "language" and not block and "norm" in name.rsplit(".", 2)[-2]:
                continue  # behind all blocks
            found.setdefault(tower, {})[block] = True
        return found

    def _block_of(self, name: str) -> str | None:
        """The block that a module or parameter is in."""
        while name and name not in self._blocks:
            name = name.rpartition(".")[0]
        return name or None

    def _bare_weights(self, tower: str, graph: bool) -> None:
        """Products with weights that belong to no layer: Gemma3's projection."""
        if tower != "projector":
            return
        for name, parameter in self._base.named_parameters():
            if name.endswith("mm_input_projection_weight"):
                inputs, outputs = getattr(parameter, "ds_shape", parameter.shape)
                is_behind = any(p.has_input_gradient or p.has_weight_gradient for p in self._products)
                self._products.append(
                    Product(name, "soft tokens", tower, float(inputs) * outputs, is_behind or graph,
                            parameter.requires_grad, False, int(outputs), int(inputs))
                )  # fmt: skip


def _merged(count: int) -> str:
    return "features" if count == 1 else f"features/{count}"


def _layers(base: Any, towers: Towers) -> Iterator[_Layer]:
    from transformers.pytorch_utils import Conv1D

    taken: tuple[str, ...] = ()
    for name, module in base.named_modules():
        if taken and is_within(name, taken):
            continue
        is_adapted = hasattr(module, "lora_A") and hasattr(module, "base_layer")
        core = getattr(module, "base_layer", module) if is_adapted else module
        if isinstance(core, nn.Linear | Conv1D | nn.modules.conv._ConvNd):
            if is_adapted:
                taken = (name,)
            yield _Layer(name, module, tower_of(name, towers))


def _by_parent(layers: Iterable[_Layer]) -> Iterator[tuple[str, list[_Layer]]]:
    groups: dict[str, list[_Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.parent, []).append(layer)
    yield from groups.items()
