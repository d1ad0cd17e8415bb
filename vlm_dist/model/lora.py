"""What is trained: LoRA or whole weights, tower by tower; which modules get LoRA, and how it starts."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm_dist.errors import ModelError
from vlm_dist.model.full import freeze_all_but, full_parameters, named_modules_to_train
from vlm_dist.model.fused_lora import fuse_lora
from vlm_dist.model.gathering import gathered
from vlm_dist.model.quantization import check_trainable, finish_quantised, is_quantised
from vlm_dist.model.towers import TOWERS, Towers, find_towers, is_within, tower_of, without_gradient

if TYPE_CHECKING:
    from vlm_dist.config.peft import PeftConfig


def attach_adapter(model: nn.Module, settings: PeftConfig, policy: Mapping[str, str], seed: int = 0) -> Any:
    """Freeze the model, then make trainable what the policy says: LoRA on linear layers, or a tower's own weights.

    The adapter keeps the dtype of its layer (`autocast_adapter_dtype=False`): the engine owns the float32 masters.
    Its start depends on the seed and each module's name only, so it is the same at any ZeRO stage and for any order.
    `adapter_config.json` holds the resolved names, so `PeftModel.from_pretrained` needs none of our code.

    Args:
        model: the pretrained model; is changed.
        settings: `target_modules` is "all-linear", a list of names or of ends of names, or a regular expression that
            must match a whole name. `modules_to_save` are trained in full, whatever the policy of their tower.
        policy: `{"vision": ..., "projector": ..., "language": ...}`, each "freeze", "lora" or "full"; a missing one is
            frozen.
        seed: of the adapter's random start.

    Returns:
        The `PeftModel`; the model itself where no tower has policy lora.

    Raises:
        ModelError: nothing matches, or the policy cannot be carried out.
    """
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ModelError(
            "attach the adapter before gradient checkpointing is enabled: PEFT would make inputs require gradients"
        )
    _check_policy(policy, settings.modules_to_save)
    towers = find_towers(model)
    whole = named_modules_to_train(model, settings.modules_to_save, towers)
    roots = [root for tower, value in policy.items() if value == "full" for root in towers[tower]]
    check_trainable({name: model.get_submodule(name) for name in (*whole, *roots)})
    in_full = full_parameters(model, policy, whole, towers)
    if "lora" not in policy.values():
        freeze_all_but(model, in_full)
        return model
    adapted = _with_lora(model, settings, lora_targets(model, settings.target_modules, policy, towers, whole))
    _freeze_biases_elsewhere(model, policy, towers)
    for parameter in in_full:
        parameter.requires_grad_(True)
    _start_from_seed(adapted, seed)
    if any(is_quantised(parameter) for parameter in model.parameters()):
        finish_quantised(adapted, next(p.dtype for p in model.parameters() if p.is_floating_point()))
    fuse_lora(adapted)
    return adapted


def _with_lora(model: nn.Module, settings: PeftConfig, targets: Sequence[str]) -> Any:
    """The model with LoRA on these layers, everything else frozen."""
    from peft import LoraConfig, TaskType, get_peft_model

    if settings.task_type not in TaskType.__members__:
        raise ModelError(
            f"peft.task_type: got {settings.task_type!r}, expected one of {', '.join(TaskType.__members__)}"
        )
    config = LoraConfig(
        task_type=settings.task_type,
        r=settings.r,
        target_modules=list(targets),
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        bias=settings.bias,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    model.requires_grad_(False)
    # PEFT draws a start too: leave the caller's generators alone. It also asks transformers by a name deprecated there.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    # get_peft_model shortens long lists to ends of names that mean the same here; the full names mean it anywhere
    adapted.peft_config["default"].target_modules = list(targets)  # type: ignore[attr-defined]
    return adapted


def lora_targets(
    model: nn.Module,
    target_modules: str | Sequence[str],
    policy: Mapping[str, str],
    towers: Towers,
    trained_whole: Sequence[str] = (),
) -> list[str]:
    """Full names of the linear layers that get LoRA, in the model's order.

    Only linear layers can have one here: suffix `proj` also hits Qwen's Conv3d patch embedding, where LoRA breaks under
    ZeRO-3. The head never has one, nor has a module that is trained in full or whose output nothing reads.

    Raises:
        ModelError: nothing matches; the message lists what there is.
    """
    # torch's own attention reads its output projection's weight without calling it: LoRA there would do nothing
    idle_parents = {name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    linear = [
        name
        for name, module in model.named_modules()
        if _is_linear(module) and name.rpartition(".")[0] not in idle_parents
    ]
    unread = without_gradient(model, towers)
    excluded = (*unread, *trained_whole)
    allowed = [
        name
        for name in linear
        if (tower := tower_of(name, towers)) in TOWERS
        and policy.get(tower, "freeze") == "lora"
        and not is_within(name, excluded)
    ]
    chosen = [name for name in allowed if _matches(name, target_modules)]
    patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if not isinstance(target_modules, str):
        idle = [pattern for pattern in patterns if not any(_matches(name, [pattern]) for name in linear)]
        if idle:
            raise ModelError(_no_match(idle, linear, "no linear layer of the model"))
    for pattern in patterns:
        matching = [
            name for name in linear if _matches(name, pattern if isinstance(target_modules, str) else [pattern])
        ]
        if matching and all(is_within(name, unread) for name in matching):
            raise ModelError(
                f"peft.target_modules: {pattern!r} matches only {', '.join(matching[:3])}, which nothing reads "
                "(vision_feature_layer of the model's config comes before it): LoRA there would never learn; remove it"
            )
    if not chosen:
        trained = [tower for tower in TOWERS if policy.get(tower) == "lora"]
        raise ModelError(_no_match(patterns, allowed, f"no linear layer of the towers with policy lora ({trained})"))
    return chosen


def _check_policy(policy: Mapping[str, str], modules_to_save: Sequence[str]) -> None:
    for tower, value in policy.items():
        if tower not in TOWERS:
            raise ModelError(f"peft towers: got {tower!r}, expected one of {', '.join(TOWERS)}")
        if value not in ("freeze", "lora", "full"):
            raise ModelError(f"peft towers: {tower}: got {value!r}, expected freeze, lora or full")
    if set(policy.values()) <= {"freeze"} and not modules_to_save:
        raise ModelError(
            "peft towers: every tower is frozen, so there is nothing to train; set one of them to lora or full"
        )


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _matches(name: str, target_modules: str | Sequence[str]) -> bool:
    if target_modules == "all-linear":
        return True
    if isinstance(target_modules, str):
        try:
            return re.fullmatch(target_modules, name) is not None
        except re.error as error:
            raise ModelError(f"peft.target_modules: {target_modules!r} is not a regular expression: {error}") from error
    return any(name == end or name.endswith(f".{end}") for end in target_modules)


def _no_match(patterns: Sequence[str], names: Sequence[str], where: str) -> str:
    ends = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
    nearest = [
        match for pattern in patterns for match in difflib.get_close_matches(pattern, [*ends, "all-linear"], n=1)
    ]
    mean = f" Did you mean {', '.join(sorted(set(nearest)))}?" if nearest else ""
    example = f" A full name is {names[0]!r}; ends that exist: {', '.join(ends)}." if names else ""
    return f"peft.target_modules: {', '.join(map(repr, patterns))} matches {where}.{mean}{example}"


def _freeze_biases_elsewhere(model: nn.Module, policy: Mapping[str, str], towers: Towers) -> None:
    """`bias: all` trains every bias; those of frozen towers, and those that nothing reads, stay frozen nevertheless."""
    unread = without_gradient(model, towers)
    for name, parameter in model.named_parameters():
        if "lora_" in name or not parameter.requires_grad:
            continue
        if policy.get(tower_of(name, towers)) != "lora" or is_within(name, unread):
            parameter.requires_grad_(False)


def _start_from_seed(adapted: nn.Module, seed: int) -> None:
    """Draw each lora_A from (seed, its name), on the CPU and in float32, as PEFT would: Kaiming-uniform, B at zero."""
    for name, parameter in adapted.named_parameters():
        if ".lora_A." not in name:
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        with gathered(parameter), torch.no_grad():
            if parameter.numel() == 0:
                continue  # partitioned, and another rank sets it
            start = torch.empty(parameter.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            parameter.copy_(start)
