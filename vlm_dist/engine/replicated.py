"""Stage 0: every rank holds masters, moments and the gradient whole; what plain data parallelism does.

DeepSpeed's own stage 0 refuses bfloat16 and float16 with float32 gradient sums, would add gradients up in the training
dtype, and in float32 applies a gradient that is not finite. So its engine runs the model here, and what is below has
the masters, the float32 sums, one reduction a step, clipping, the decision to skip, and the loss scale of float16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ReplicatedOptimizer:
    """Float32 masters and gradient sums around torch's Adam. Takes the place of a ZeRO optimizer.

    Each group's parameters are concatenated, without padding, into one flat master, which is what the wrapped
    optimizer updates, as under ZeRO. A parameter that is itself float32 is a view of it.

    Args:
        optimizer: torch's Adam or AdamW over the model's parameters; from here on over the flat masters.
        max_grad_norm: gradients are clipped to this global norm; 0 = never.
        loss_scaler: float16 only.

    Attributes:
        flats: the masters, one for each group of the optimizer; `.grad` is the sum of the gradient so far.
        groups: the model's parameters, in the order in which they lie in the masters.
        overflow: whether the last step was not applied.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_grad_norm: float, loss_scaler: Any = None) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups  # DeepSpeed reads it
        self.loss_scaler = loss_scaler
        self.overflow = False
        self._global_grad_norm: Tensor | float | None = None
        self._max_grad_norm = max_grad_norm
        self.groups: list[list[nn.Parameter]] = []
        self.flats: list[Tensor] = []
        self._rounded: list[tuple[nn.Parameter, Tensor]] = []
        self._hooks: list[Any] = []
        for group in optimizer.param_groups:
            self._flatten(group)

    def _flatten(self, group: dict[str, Any]) -> None:
        parameters = list(group["params"])
        flat = torch.cat([parameter.detach().reshape(-1).float() for parameter in parameters])
        flat.requires_grad_(True)
        flat.grad = torch.zeros_like(flat)
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            master = flat.detach()[start:end].view(parameter.shape)
            if parameter.dtype is torch.float32:
                parameter.data = master
            else:
                self._rounded.append((parameter, master))
            total = flat.grad[start:end].view(parameter.shape)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(_adds_to(total)))
            start = end
        group["params"] = [flat]
        self.groups.append(parameters)
        self.flats.append(flat)

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by before backward."""
        return float(self.loss_scaler.cur_scale) if self.loss_scaler is not None else 1.0

    @torch.no_grad()
    def step(self) -> None:
        """Average the gradient over the ranks, clip, update, forget it; nothing is updated where it is not finite.

        Collective: every rank calls this.
        """
        totals = [flat.grad for flat in self.flats if flat.grad is not None]
        for total in totals:
            dist.all_reduce(total)
        unscale = 1.0 / (self.loss_scale * dist.get_world_size())
        norm = torch.stack([torch.linalg.vector_norm(total) for total in totals]).norm() * unscale
        # every rank has the same sums; should one differ in a bit, all still decide and clip alike
        norm = norm.where(norm.isfinite(), torch.inf)
        dist.all_reduce(norm, op=dist.ReduceOp.MAX)
        self._global_grad_norm = norm
        self.overflow = not bool(norm.isfinite())
        self._update_scale(self.overflow)
        if not self.overflow:
            factor: Tensor | float = unscale
            if self._max_grad_norm > 0:
                factor = unscale * (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            for total in totals:
                total.mul_(factor)
            self.optimizer.step()
            self.update_lp_params()
        self.zero_grad()

    @torch.no_grad()
    def update_lp_params(self) -> None:
        """Round the masters into the weights that the model computes with."""
        if self._rounded:
            weights, masters = zip(*self._rounded, strict=True)
            torch._foreach_copy_([weight.detach() for weight in weights], masters)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradient. The sums stay where they are: the parameters' hooks add to them."""
        for flat in self.flats:
            if flat.grad is not None:
                flat.grad.zero_()

    def destroy(self) -> None:
        """Let go of the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _update_scale(self, has_overflow: bool) -> None:
        if self.loss_scaler is not None:
            self.loss_scaler.update_scale(has_overflow)


def _adds_to(total: Tensor) -> Callable[[Tensor], None]:
    """A hook that moves a parameter's gradient into its float32 sum as soon as it is there."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad)
        parameter.grad = None

    return add


def initialise_replicated(
    model: nn.Module,
    make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    param_groups: list[dict[str, Any]],
    ds_config: Mapping[str, Any],
) -> Any:
    """What `deepspeed.initialize` is for the other stages. Collective.

    Args:
        model: as it was loaded; its parameters become rank 0's.
        make_optimizer: makes torch's Adam or AdamW from the groups.
        param_groups: not empty.
        ds_config: from `merge_deepspeed_config`, of stage 0.

    Returns:
        The DeepSpeed engine, whose `optimizer` is a `ReplicatedOptimizer`.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine

    config = dict(ds_config)

    class ReplicatedEngine(DeepSpeedEngine):  # type: ignore[misc]
        def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
            self.basic_optimizer = client_optimizer(model_parameters)
            scaler = _float16_scaler(self) if config["fp16"]["enabled"] else None
            self.optimizer = ReplicatedOptimizer(self.basic_optimizer, config["gradient_clipping"], scaler)

        def allreduce_gradients(self, *arguments: Any, **named: Any) -> None:
            """Reduce nothing: the optimizer does, once a step."""

        def clip_fp32_gradients(self) -> None:
            """Clip nothing: the optimizer does."""

    return ReplicatedEngine(
        args=None,
        model=model,
        optimizer=make_optimizer,
        model_parameters=param_groups,
        dist_init_required=False,
        config=config,
        config_class=DeepSpeedConfig(config),
    )


def _float16_scaler(deepspeed_engine: Any) -> Any:
    """The loss scaler that ZeRO would have."""
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler

    return CreateLossScaler(
        dtype=torch.float16,
        static_loss_scale=deepspeed_engine.loss_scale(),
        dynamic_scaling=deepspeed_engine.dynamic_loss_scale(),
        dynamic_loss_args=deepspeed_engine.dynamic_loss_scale_args(),
    )
