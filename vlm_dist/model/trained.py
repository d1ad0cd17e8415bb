"""The table of what is trained, tower by tower, and the longer list of the layers with LoRA."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from vlm_dist.model.checkpointing import base_model
from vlm_dist.model.quantization import num_elements
from vlm_dist.model.towers import TOWERS, find_towers, policy_of, tower_of

_BASE = "base_model.model."


@dataclass(frozen=True)
class TowerRow:
    """One line of the table of what is trained.

    Attributes:
        tower: vision, projector, language or head; the last line is "all".
        policy: freeze, lora or full; "part" for a frozen tower of which `modules_to_save` trains something.
        num_lora_modules: layers with LoRA.
        num_parameters: of all, LoRA included.
        num_trainable: of those.
        learning_rate: at its peak; None where nothing is trained, and in the last line.
    """

    tower: str
    policy: str
    num_lora_modules: int
    num_parameters: int
    num_trainable: int
    learning_rate: float | None = None


def tower_table(
    model: nn.Module,
    policy: Mapping[str, str] | None = None,
    learning_rate: float | None = None,
    towers_learning_rate: Mapping[str, float | None] | None = None,
) -> list[TowerRow]:
    """What is trained, tower by tower, and in all.

    Args:
        model: a model, with or without adapter; under ZeRO-3 too.
        policy: for display.
        learning_rate: common to all towers, for display.
        towers_learning_rate: of single towers, where it differs.
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
        count = num_elements(parameter)
        total[tower] += count
        trainable[tower] += count if parameter.requires_grad else 0
    rates = towers_learning_rate or {}
    rows = [
        TowerRow(
            tower,
            _told(policy_of(tower, policy or {}), trainable[tower]),
            lora[tower],
            total[tower],
            trainable[tower],
            (rates.get(_followed(tower)) or learning_rate) if trainable[tower] else None,
        )
        for tower in lora
        if total[tower]
    ]
    return [*rows, TowerRow("all", "", sum(lora.values()), sum(total.values()), sum(trainable.values()))]


def format_tower_table(rows: Sequence[TowerRow]) -> str:
    """The table as text, one line per tower."""
    lines = [
        f"{'tower':<10} {'policy':<7} {'LoRA modules':>12} {'parameters':>15} {'trainable':>13} {'share':>8} "
        f"{'learning rate':>13}"
    ]
    for row in rows:
        share = row.num_trainable / max(1, row.num_parameters)
        rate = "" if row.learning_rate is None else f"{row.learning_rate:g}"
        line = (
            f"{row.tower:<10} {row.policy:<7} {row.num_lora_modules:>12,} {row.num_parameters:>15,} "
            f"{row.num_trainable:>13,} {share:>8.3%} {rate:>13}"
        )
        lines.append(line.rstrip())
    return "\n".join(lines)


def describe_trained(model: nn.Module) -> str:
    """What is trained, layer by layer: a pattern with * for numbers, and how many there are of each; one per line."""
    kinds: Counter[tuple[str, str]] = Counter()
    for name, module in base_model(model).named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            kinds[_pattern(name), "lora"] += 1
    for name, parameter in base_model(model).named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            kinds[_pattern(name), "full"] += 1
    width = max((len(pattern) for pattern, _ in kinds), default=0)
    return "".join(f"{pattern:<{width}} {kind:<4} {count:>5,}\n" for (pattern, kind), count in kinds.items())


def tower_rates(model: nn.Module, rates: Mapping[str, float | None]) -> Callable[[str], float | None]:
    """The own learning rate of a parameter, by its name in the model, with adapter or without; None: the common one."""
    towers = find_towers(base_model(model))
    return lambda name: rates.get(_followed(tower_of(name.removeprefix(_BASE), towers)))


def tower_namer(model: nn.Module) -> Callable[[str], str]:
    """A function that tells the tower of a parameter, by its name in the model, with adapter or without."""
    towers = find_towers(base_model(model))
    return lambda name: tower_of(name.removeprefix(_BASE), towers)


def _told(policy: str, num_trainable: int) -> str:
    return "part" if policy == "freeze" and num_trainable else policy


def _followed(tower: str) -> str:
    """The tower whose learning rate applies."""
    return "language" if tower == "head" else tower


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
