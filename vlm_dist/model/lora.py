"""LoRA, tower by tower: which modules get it, how it starts, and the table that says so."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm_dist.errors import ModelError
from vlm_dist.model.checkpointing import base_model
from vlm_dist.model.towers import TOWERS, Towers, find_towers, tower_of, without_gradient

if TYPE_CHECKING:
    from vlm_dist.config.peft import PeftConfig


@dataclass(frozen=True)
class TowerRow:
    """One line of the table of what is trained."""

    tower: str
    policy: str
    num_lora_modules: int
    num_parameters: int
    num_trainable: int


def attach_adapter(model: nn.Module, settings: PeftConfig, policy: Mapping[str, str], seed: int = 0) -> Any:
    """Freeze the model and put LoRA on the linear layers that the policy and `target_modules` choose.

    The adapter keeps the dtype of its layer (`autocast_adapter_dtype=False`): the engine owns the float32 masters.
    Its start depends on the seed and each module's name only, so it is the same at any ZeRO stage and for any order.
    `adapter_config.json` holds the resolved names, so `PeftModel.from_pretrained` needs none of our code.

    Args:
        model: the pretrained model; is changed.
        settings: `target_modules` is "all-linear", a list of names or of ends of names, or a regular expression that
            must match a whole name.
        policy: `{"vision": ..., "projector": ..., "language": ...}`, each "freeze" or "lora"; a missing one is frozen.
        seed: of the adapter's random start.

    Returns:
        The `PeftModel`.

    Raises:
        ModelError: nothing matches, or the policy cannot be carried out.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    towers = find_towers(model)
    targets = lora_targets(model, settings.target_modules, policy, towers)
    if settings.task_type not in TaskType.__members__:
        raise ModelError(
            f"peft.task_type: got {settings.task_type!r}, expected one of {', '.join(TaskType.__members__)}"
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ModelError(
            "attach the adapter before gradient checkpointing is enabled: PEFT would make inputs require gradients"
        )
    config = LoraConfig(
        task_type=settings.task_type,
        r=settings.r,
        target_modules=targets,
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
    _freeze_biases_elsewhere(model, policy, towers)
    _start_from_seed(adapted, seed)
    # get_peft_model shortens long lists to ends of names that mean the same here; the full names mean it anywhere
    adapted.peft_config["default"].target_modules = list(targets)  # type: ignore[attr-defined]
    return adapted


def lora_targets(
    model: nn.Module, target_modules: str | Sequence[str], policy: Mapping[str, str], towers: Towers | None = None
) -> list[str]:
    """Full names of the linear layers that get LoRA, in the model's order.

    Only linear layers can have one here: suffix `proj` also hits Qwen's Conv3d patch embedding, where LoRA breaks under
    ZeRO-3. The head never has one.

    Raises:
        ModelError: unknown policy, or nothing matches; the message lists what there is.
    """
    towers = towers or find_towers(model)
    _check_policy(policy)
    # torch's own attention reads its output projection's weight without calling it: LoRA there would do nothing
    idle_parents = {name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    linear = [
        name
        for name, module in model.named_modules()
        if _is_linear(module) and name.rpartition(".")[0] not in idle_parents
    ]
    unused = without_gradient(model, towers)
    allowed = [
        name
        for name in linear
        if (tower := tower_of(name, towers)) in TOWERS
        and policy.get(tower, "freeze") == "lora"
        and not any(name == root or name.startswith(root + ".") for root in unused)
    ]
    chosen = [name for name in allowed if _matches(name, target_modules)]
    patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if not isinstance(target_modules, str):
        idle = [pattern for pattern in patterns if not any(_matches(name, [pattern]) for name in linear)]
        if idle:
            raise ModelError(_no_match(idle, linear, "no linear layer of the model"))
    if not chosen:
        trained = [tower for tower in TOWERS if policy.get(tower) == "lora"]
        raise ModelError(_no_match(patterns, allowed, f"no linear layer of the towers with policy lora ({trained})"))
    return chosen


def tower_table(model: nn.Module, policy: Mapping[str, str] | None = None) -> list[TowerRow]:
    """What is trained, tower by tower, and in all.

    Args:
        model: a model, with or without adapter; under ZeRO-3 too.
        policy: for display.
    """
    base = base_model(model)
    # PEFT wraps a layer `x` as `x.base_layer` and adds `x.lora_A…`: the tower is found by the first part
    towers = find_towers(base)
    lora: dict[str, int] = dict.fromkeys((*TOWERS, "head"), 0)
    total, trainable = dict(lora), dict(lora)
    for name, module in base.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            lora[tower_of(name, towers)] += 1
    for name, parameter in base.named_parameters():
        tower = tower_of(name, towers)
        count = int(getattr(parameter, "ds_numel", parameter.numel()))  # a partitioned parameter is empty
        total[tower] += count
        trainable[tower] += count if parameter.requires_grad else 0
    rows = [
        TowerRow(tower, (policy or {}).get(tower, "freeze"), lora[tower], total[tower], trainable[tower])
        for tower in lora
        if total[tower]
    ]
    return [*rows, TowerRow("all", "", sum(lora.values()), sum(total.values()), sum(trainable.values()))]


def format_tower_table(rows: Sequence[TowerRow]) -> str:
    """The table as text, one line per tower."""
    lines = [f"{'tower':<10} {'policy':<7} {'LoRA modules':>12} {'parameters':>15} {'trainable':>13} {'share':>8}"]
    for row in rows:
        share = row.num_trainable / max(1, row.num_parameters)
        lines.append(
            f"{row.tower:<10} {row.policy:<7} {row.num_lora_modules:>12,} {row.num_parameters:>15,} "
            f"{row.num_trainable:>13,} {share:>8.3%}"
        )
    return "\n".join(lines)


def _check_policy(policy: Mapping[str, str]) -> None:
    for tower, value in policy.items():
        if tower not in TOWERS:
            raise ModelError(f"peft towers: got {tower!r}, expected one of {', '.join(TOWERS)}")
        if value == "full":
            raise ModelError(f"peft towers: {tower}: full is not yet supported; use freeze or lora")
        if value not in ("freeze", "lora"):
            raise ModelError(f"peft towers: {tower}: got {value!r}, expected freeze or lora")
    if "lora" not in policy.values():
        raise ModelError("peft towers: every tower is frozen, so there is nothing to train; set one of them to lora")


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
    nearest = [match for pattern in patterns for match in difflib.get_close_matches(pattern, ends, n=1)]
    mean = f" Did you mean {', '.join(sorted(set(nearest)))}?" if nearest else ""
    example = f" A full name is {names[0]!r}; ends that exist: {', '.join(ends)}." if names else ""
    return f"peft.target_modules: {', '.join(map(repr, patterns))} matches {where}.{mean}{example}"


def _freeze_biases_elsewhere(model: nn.Module, policy: Mapping[str, str], towers: Towers) -> None:
    """`bias: all` trains every bias; those of frozen towers and of the head stay frozen nevertheless."""
    for name, parameter in model.named_parameters():
        if "lora_" not in name and parameter.requires_grad and policy.get(tower_of(name, towers)) != "lora":
            parameter.requires_grad_(False)


def _start_from_seed(adapted: nn.Module, seed: int) -> None:
    """Draw each lora_A from (seed, its name), on the CPU and in float32, as PEFT would: Kaiming-uniform, B at zero."""
    for name, parameter in adapted.named_parameters():
        if ".lora_A." not in name:
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        with _gathered(parameter), torch.no_grad():
            if parameter.numel() == 0:
                continue  # partitioned, and another rank sets it
            start = torch.empty(parameter.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            parameter.copy_(start)


def _gathered(parameter: nn.Parameter) -> Any:
    """A parameter that ZeRO-3 has already partitioned, whole for a moment; PEFT names DeepSpeed so that we need not."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from peft.utils.integrations import gather_params_ctx

    return gather_params_ctx(parameter)
