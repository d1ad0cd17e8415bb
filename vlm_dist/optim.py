"""What moves the parameters: groups, optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm_dist.errors import ConfigError

if TYPE_CHECKING:
    from vlm_dist.config.train import TrainConfig

#: The factor of the learning rate at a step (from 0): what the step-th optimizer update uses.
LearningRateSchedule = Callable[[int], float]


def parameter_groups(
    model: nn.Module, weight_decay: float, own_rate: Callable[[str], float | None] = lambda name: None
) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate, and those that decay apart from those that do not.

    Biases, norms and DoRA magnitudes (all of one dimension) do not decay: pulling them to zero fights normalisation.

    Args:
        model: only its parameters with `requires_grad` are taken, in the order of `named_parameters`.
        weight_decay: of the matrices.
        own_rate: a parameter's name -> its learning rate, where it differs from the common one; None: the common one.

    Returns:
        One group for each kind that there is, those with the common rate first: `{"params": [...], "weight_decay":
        float}`, and `"lr"` where it differs.
    """
    groups: dict[tuple[float | None, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 a partitioned parameter is flat; its true shape is ds_shape.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            # without weight decay there is nothing to tell apart: one group, in the model's order
            decays = len(shape) >= 2 or weight_decay == 0
            groups.setdefault((own_rate(name), decays), []).append(parameter)
    ordered = sorted(groups, key=lambda kind: (kind[0] is not None, kind[0] or 0.0, not kind[1]))
    return [
        {"params": groups[rate, decays], "weight_decay": weight_decay if decays else 0.0}
        | ({} if rate is None else {"lr": rate})
        for rate, decays in ordered
    ]


def make_optimizer(settings: TrainConfig, groups: Iterable[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW over these groups; torch's fused kernel on a GPU.

    Args:
        settings: `learning_rate`, `adam_beta1`, `adam_beta2`, `adam_epsilon`.
        groups: as `parameter_groups` makes them; each carries its own `weight_decay`, and maybe its own `lr`.
    """
    groups = list(groups)
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = bool(parameters) and all(p.is_cuda and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=fused or None,
    )


def make_lr_schedule(settings: TrainConfig, num_steps: int) -> LearningRateSchedule:
    """The learning rate's factor at each step, without state: resuming at a step needs nothing but the step.

    Step `i` (from 0) is the i-th update. During `w` warm-up steps the factor is (i + 1) / (w + 1), never 0, so that no
    update is wasted; step `w` has the full rate. The decay would reach 0 at step `num_steps`, one after the last.

    Args:
        settings: `lr_scheduler_type` (linear, cosine, constant, constant_with_warmup) and `warmup_steps`, or where that
            is 0, `warmup_ratio` (a share of all steps, rounded up).
        num_steps: of the whole run, wherever this process stops.

    Raises:
        ConfigError: unknown `lr_scheduler_type`.
    """
    kind = settings.lr_scheduler_type
    if kind not in SHAPES:
        raise ConfigError(f"train.lr_scheduler_type: got {kind!r}, expected one of {', '.join(sorted(SHAPES))}")
    warmup = settings.warmup_steps or math.ceil(num_steps * settings.warmup_ratio)
    if kind == "constant":
        warmup = 0
    warmup = min(warmup, num_steps)
    shape = SHAPES[kind]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return shape(min(1.0, (step - warmup) / max(1, num_steps - warmup)))

    return factor


#: Progress after the warm-up (0 to 1) -> factor.
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
    "constant_with_warmup": lambda progress: 1.0,
}
