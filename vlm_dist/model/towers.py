"""Which modules of a model are its vision tower, its projector, its language model and its head.

Found through the accessors that all families share, not through a table of families.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from vlm_dist.errors import ModelError

#: The towers that a policy can name. `head` is a fourth place: it never has LoRA, being shared with the embeddings in
#: many models and as large as many layers; where the language model is trained in full, so is its head.
TOWERS = ("vision", "projector", "language")

#: Children of a vision tower that map its features into the language model's space.
_MERGERS = ("merger", "deepstack_merger_list", "downsample", "multi_modal_projector")

#: Modules of a vision tower that classify whole pictures: no language model reads them.
_POOLING = ("head", "pooler")

#: Norms behind the last layer: models that choose a layer's features (`vision_feature_layer`) read them before it.
_LAST_NORMS = ("post_layernorm",)

_VISION_NAMES = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower", "img_processor")
_LANGUAGE_NAMES = ("language_model", "text_model", "decoder")

#: Tower -> full names of the modules that are its roots; the longest root that is a prefix decides.
Towers = Mapping[str, tuple[str, ...]]


def find_towers(model: Any) -> Towers:
    """The roots of each tower.

    Args:
        model: a transformers model without adapter.

    Returns:
        `{"vision": names, "projector": names, "language": names, "head": names}`; a model without a vision tower has
        no names under "vision".

    Raises:
        ModelError: no language model can be told apart.
    """
    names = {id(module): name for name, module in model.named_modules()}
    vision = _root(names, _encoder(model))
    language = _root(names, _decoder(model))
    head = _root(names, model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None)
    if not language:
        if vision:
            raise ModelError(
                f"{type(model).__name__}: cannot tell its language model from the rest (no get_decoder())."
            )
        return {"vision": (), "projector": (), "language": ("",), "head": head}
    mergers = tuple(
        f"{root}.{name}"
        for root in vision
        for name, _ in model.get_submodule(root).named_children()
        if name in _MERGERS
    )
    projector = mergers + _between(vision, language) + tuple(_rest(model, "", (*vision, *language, *head)))
    return {"vision": vision, "projector": projector, "language": language, "head": head}


def _between(vision: tuple[str, ...], language: tuple[str, ...]) -> tuple[str, ...]:
    """What holds a vision tower within the language model, as in Phi-3-vision: its rest projects."""
    found = []
    for root in vision:
        for outer in language:
            if root.startswith(outer + ".") and "." in root[len(outer) + 1 :]:
                found.append(outer + "." + root[len(outer) + 1 :].split(".", 1)[0])
    return tuple(found)


def tower_of(name: str, towers: Towers) -> str:
    """The tower of a module or parameter, by its full name in the model without adapter.

    A parameter that stands beside the towers (such as `image_newline`) counts as projector.
    """
    best, length = "projector", -1
    for tower, roots in towers.items():
        for root in roots:
            if len(root) > length and is_within(name, (root,)):
                best, length = tower, len(root)
    return best


def policy_of(tower: str, policy: Mapping[str, str]) -> str:
    """What is trained of a tower; a missing one is frozen. The head follows the language model, but has no LoRA."""
    if tower == "head":
        return "full" if policy.get("language") == "full" else "freeze"
    return policy.get(tower, "freeze")


def is_within(name: str, roots: Iterable[str]) -> bool:
    """Whether a module or parameter is one of these modules, or inside one."""
    return any(root in ("", name) or name.startswith(f"{root}.") for root in roots)


def without_gradient(model: nn.Module, towers: Towers) -> tuple[str, ...]:
    """Roots of modules whose output nothing reads, so that what is trained there would never get a gradient.

    Heads that pool a picture; and where the model takes the features of an inner layer (LLaVA's
    `vision_feature_layer`, such as -2), what comes after that layer.
    """
    chosen = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    unused: list[str] = []
    for root in towers["vision"]:
        modules = [(name, module) for name, module in model.get_submodule(root).named_modules() if name]
        outside_layers = [name for name, _ in modules if not any(part.isdigit() for part in name.split("."))]
        ends = _POOLING if chosen is None else (*_POOLING, *_LAST_NORMS)
        unused += [f"{root}.{name}" for name in outside_layers if name.rsplit(".", 1)[-1] in ends]
        if chosen is not None:
            unused += _layers_after(root, modules, chosen)
    return tuple(unused)


def _layers_after(root: str, modules: Iterable[tuple[str, nn.Module]], chosen: int | Iterable[int]) -> list[str]:
    """The layers of a vision tower behind the last one whose features are taken."""
    for name, module in modules:
        if isinstance(module, nn.ModuleList) and name.rsplit(".", 1)[-1] in ("layers", "layer", "blocks"):
            count = len(module)  # hidden state i is the input of layer i; the last is the output
            indices = [chosen] if isinstance(chosen, int) else list(chosen)
            used = max(index if index >= 0 else count + 1 + index for index in indices)
            return [f"{root}.{name}.{index}" for index in range(used, count)]
    return []


def _encoder(model: Any) -> nn.Module | None:
    getter = getattr(model, "get_encoder", None)
    if getter is not None and "modality" in inspect.signature(getter).parameters:
        found: nn.Module = getter(modality="image")
        if found is not model and found is not getattr(model, "model", None):
            return found
    return _first_named(model, _VISION_NAMES)


def _decoder(model: Any) -> nn.Module | None:
    getter = getattr(model, "get_decoder", None)
    if getter is not None:
        found: nn.Module | None = getter()
        if found is not None and found is not model:
            return found
    return _first_named(model, _LANGUAGE_NAMES)


def _first_named(model: nn.Module, wanted: Iterable[str]) -> nn.Module | None:
    """The shallowest module with one of these names."""
    wanted = set(wanted)
    found = [(name.count("."), name, module) for name, module in model.named_modules() if name.split(".")[-1] in wanted]
    return min(found, key=lambda item: item[:2])[2] if found else None


def _root(names: Mapping[int, str], module: nn.Module | None) -> tuple[str, ...]:
    name = None if module is None else names.get(id(module))
    return (name,) if name else ()


def _rest(model: nn.Module, prefix: str, taken: tuple[str, ...]) -> Iterable[str]:
    """The largest modules with parameters that neither are nor hold one of `taken`."""
    for child, module in model.get_submodule(prefix).named_children():
        name = f"{prefix}.{child}" if prefix else child
        if name in taken:
            continue
        if any(root.startswith(name + ".") for root in taken):
            yield from _rest(model, name, taken)
        elif any(True for _ in module.parameters()):
            yield name
