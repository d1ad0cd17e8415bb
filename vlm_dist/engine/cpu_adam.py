"""DeepSpeed's Adam for the CPU, for an offloaded optimizer: compiled once on each machine, else torch's own is used.

It is several times faster than torch's on a machine with many cores, since it goes over the state once. What it needs
is a C++ compiler and ninja; where these are missing, or what they made does not compute what torch does, the run goes
on with torch's AdamW and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from vlm_dist.engine.build_directory import own_build_directory

#: Of a parameter after a few steps, against torch's AdamW: both round in float32, in another order.
TOLERANCE = 1e-5

_state: dict[str, str | None] = {}  # "problem": why it cannot be used; None where it can. Empty: not yet asked.


def offloads_optimizer(ds_config: Mapping[str, Any]) -> bool:
    """Whether the optimizer's state lies in the memory of the CPU, or behind it."""
    offload = ds_config["zero_optimization"].get("offload_optimizer") or {}
    return bool(offload.get("device", "none") != "none")


def prepare_cpu_adam(ds_config: Mapping[str, Any]) -> None:
    """Compile and try out the optimizer, if the configuration offloads it. Local; may take minutes the first time."""
    if offloads_optimizer(ds_config) and "problem" not in _state:
        _state["problem"] = _compile_and_try()


def use_cpu_adam(
    optimizer: torch.optim.Optimizer, ds_config: Mapping[str, Any], group: dist.ProcessGroup
) -> tuple[torch.optim.Optimizer, str | None]:
    """Replace torch's Adam by DeepSpeed's, if the configuration offloads it and all ranks can. Collective.

    Args:
        optimizer: torch's Adam or AdamW over the model's parameters.
        ds_config: from `merge_deepspeed_config`.
        group: gloo, of all ranks.

    Returns:
        The optimizer to use, and why it is torch's although the state is offloaded; None where nothing is to be told.
    """
    if not offloads_optimizer(ds_config):
        return optimizer, None
    prepare_cpu_adam(ds_config)
    problems: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, _state["problem"], group=group)
    for rank, problem in enumerate(problems):
        if problem is not None:
            return optimizer, f"rank {rank} cannot use DeepSpeed's CPU Adam, so all use torch's AdamW: {problem}"
    return _deepspeed_adam(optimizer), None


def _deepspeed_adam(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An equal optimizer over the same parameters; it has no state yet."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    kept = ("params", "lr", "betas", "eps", "weight_decay")
    groups = [{key: group[key] for key in kept} for group in optimizer.param_groups]
    made: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=isinstance(optimizer, torch.optim.AdamW))
    return made


def _compile_and_try() -> str | None:
    """Why DeepSpeed's Adam cannot be used here; None if it can."""
    try:
        with own_build_directory():
            from deepspeed.ops.op_builder import CPUAdamBuilder

            CPUAdamBuilder().load(verbose=False)
        deviation = _deviation_from_torch()
    except Exception as error:  # noqa: BLE001 - whatever a compiler may say: there is another optimizer
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        return f"{lines[0][:300]} (it needs g++ and ninja; see docs/zero.md)"
    if not deviation <= TOLERANCE:
        return f"it deviates from torch's by {deviation:.1e} in a trial, more than {TOLERANCE:.0e}"
    return None


def _deviation_from_torch() -> float:
    """Largest difference of any element after three steps on 1001 elements; they are of the order of 1."""
    start = torch.linspace(-1, 1, 1001)
    results = []
    for make in (lambda optimizer: optimizer, _deepspeed_adam):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = make(torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1))
        for step in range(3):
            parameter.grad = torch.cos(start * (step + 1)) * 10.0 ** (step - 2)
            optimizer.step()
        results.append(parameter.detach())
    return float((results[0] - results[1]).abs().max())
