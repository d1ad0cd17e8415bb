"""Gradient (activation) checkpointing block by block, and frozen towers that leave no trace in the graph."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlm_dist.errors import ModelError
from vlm_dist.model.towers import find_towers, is_within, tower_of

#: Which blocks of a tower: "all", "none", a number (the first so many), or "every-K" (the first of each K).
BlockPolicy = str | int


@dataclass(frozen=True)
class Checkpointed:
    """How many blocks of a tower are computed again in the backward.

    Attributes:
        tower: "vision", "projector" or "language".
        num_blocks: there are.
        num_checkpointed: are computed again.
        is_frozen: nothing in the tower or before it is trained, so that there is no backward.
    """

    tower: str
    num_blocks: int
    num_checkpointed: int
    is_frozen: bool

    def __str__(self) -> str:
        if self.is_frozen:
            return f"{self.tower}: frozen, no graph"
        return f"{self.tower}: {self.num_checkpointed} of {self.num_blocks} blocks"


def enable_gradient_checkpointing(
    model: nn.Module, language: BlockPolicy = "all", vision: BlockPolicy = "all"
) -> list[Checkpointed]:
    """Recompute activations of some blocks in the backward instead of keeping them.

    Non-reentrant: the reentrant kind gives vision LoRA no gradient in several families, and needs inputs that require
    gradients. transformers turns those on by itself, also on the patch embedding, and the backward then runs through
    the whole frozen vision tower (12.01 against 5.40 GF, measured on a tiny Qwen2.5-VL). The LoRA gradients are
    bit-identical without, so the hooks are taken off again.

    Of N blocks it is the first N: the backward starts at the last blocks, whose activations are gone before the first
    are computed again. Blocks without a graph are never among them.

    Call it after `attach_adapter`: PEFT would put the hooks back on a model that already checkpoints.

    Args:
        model: a `PreTrainedModel`, or a `PeftModel` around one; acts only in `train()` mode.
        language: which blocks of the language model.
        vision: which blocks of the vision tower, and of the projector where that has blocks.

    Returns:
        What became of each tower.

    Raises:
        ModelError: the model's class does not support it, or not block by block.
    """
    base = base_model(model)
    arguments = {"use_reentrant": False}
    try:
        if hasattr(base, "activation_checkpointing_enable"):  # the name from transformers 5.18 on
            base.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
        else:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    except ValueError as error:
        raise ModelError(f"train.gradient_checkpointing: {error}. Set it to false for this model.") from error
    base.disable_input_require_grads()
    policies = {"language": language, "vision": vision, "projector": vision}
    return [_apply_policy(tower, blocks, policies[tower]) for tower, blocks in _blocks(base).items() if blocks]


def run_frozen_towers_without_graph(model: nn.Module) -> list[str]:
    """Put what is frozen of the vision tower, and has nothing trained before it, under `no_grad`.

    Nothing that happens outside, such as a hook that makes inputs require gradients, can then pull it into the
    backward.

    Args:
        model: with its adapter, or with what is trained set otherwise.

    Returns:
        Names of the modules that are under `no_grad` now.
    """
    base = base_model(model)
    names = []
    for root in find_towers(base)["vision"]:
        tower = base.get_submodule(root)
        if not _trains(tower):
            names.append(root)
        elif not _starts_trained(base, root):
            blocks = [name for name in block_names(base) if is_within(name, (root,))]
            names += blocks[: _first_trained(base, blocks)]
    for name in names:
        module = base.get_submodule(name)
        module.forward = _without_grad(module.forward)
    return names


def base_model(model: Any) -> Any:
    """The transformers model inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _without_grad(forward: Any) -> Any:
    @functools.wraps(forward)
    def under_no_grad(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return forward(*args, **kwargs)

    return under_no_grad


@dataclass(frozen=True)
class _Tower:
    """The blocks of a tower in the order of their calls; those before `start` have no graph."""

    modules: Sequence[Any]
    start: int


def _blocks(base: nn.Module) -> dict[str, _Tower | None]:
    """Tower -> its blocks; modules that checkpoint all their blocks by code of their own are blocks themselves."""
    towers = find_towers(base)
    by_tower: dict[str, list[str]] = {"language": [], "projector": [], "vision": []}
    for name in block_names(base):
        by_tower[tower_of(name, towers)].append(name)
    is_vision_trained = any(_trains(base.get_submodule(root)) for root in towers["vision"])
    found: dict[str, _Tower | None] = {}
    for tower, names in by_tower.items():
        is_first = {
            "vision": not any(_starts_trained(base, root) for root in towers["vision"]),
            "projector": not is_vision_trained,
        }.get(tower, False)
        start = _first_trained(base, names) if is_first else 0
        found[tower] = _Tower([base.get_submodule(name) for name in names], start) if names else None
    return found


def _apply_policy(tower: str, blocks: _Tower, policy: BlockPolicy) -> Checkpointed:
    from transformers.modeling_layers import GradientCheckpointingLayer

    modules, count = blocks.modules, len(blocks.modules)
    if not all(isinstance(module, GradientCheckpointingLayer) for module in modules) and policy not in ("all", "none"):
        raise ModelError(
            f"train.gradient_checkpointing_policy.{tower}: got {policy}, but the model's own code checkpoints all "
            "blocks or none; set it to all or none"
        )
    chosen = [number for number in chosen_blocks(policy, count) if number >= blocks.start]
    for number, module in enumerate(modules):
        module.gradient_checkpointing = number in chosen
    return Checkpointed(tower, count, len(chosen), is_frozen=blocks.start == count)


def chosen_blocks(policy: BlockPolicy, count: int) -> list[int]:
    """The blocks that a policy means, of `count`."""
    if policy == "none":
        return []
    if policy == "all":
        return list(range(count))
    if isinstance(policy, int):
        return list(range(min(policy, count)))
    return list(range(0, count, int(policy.removeprefix("every-"))))


def block_names(base: nn.Module) -> list[str]:
    """Names of the modules that can checkpoint, the innermost where one holds others."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [name for name, module in base.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    others = [name for name, module in base.named_modules() if hasattr(module, "gradient_checkpointing") and name]
    # remote code: a module with the flag runs its blocks itself
    alone = [
        name
        for name in others
        if name not in layers and not any(is_within(other, (name,)) for other in layers) and not is_within(name, layers)
    ]
    order = {name: number for number, (name, _) in enumerate(base.named_modules())}
    return sorted([*layers, *alone], key=order.__getitem__)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _first_trained(base: nn.Module, names: Sequence[str]) -> int:
    """Number of leading modules in which nothing is trained."""
    return next((number for number, name in enumerate(names) if _trains(base.get_submodule(name))), len(names))


def _starts_trained(base: nn.Module, root: str) -> bool:
    """Whether something of a vision tower beside its blocks and its projector is trained, such as its embeddings."""
    towers = find_towers(base)
    apart = (*block_names(base), *(name for name in towers["projector"] if is_within(name, (root,))))
    return any(
        parameter.requires_grad
        for name, parameter in base.named_parameters()
        if is_within(name, (root,)) and not is_within(name, apart)
    )
