"""Gradients of an offloaded optimizer below ZeRO-3: forgotten after each step.

DeepSpeed zeroes neither what it has summed on the CPU nor the gradient of the masters there: a parameter without a
gradient in a step would be updated with an earlier one's, as under ZeRO-3.
"""

from __future__ import annotations

from typing import Any


def offloads(zero_optimizer: Any) -> bool:
    """Whether this is the ZeRO optimizer of stage 2, with its state offloaded."""
    return bool(getattr(zero_optimizer, "cpu_offload", False)) and hasattr(zero_optimizer, "accumulated_grads_in_cpu")


def forget_sums(zero_optimizer: Any) -> None:
    """After a step, or instead of one: nothing of the gradient is left."""
    zero = zero_optimizer
    zero.reset_cpu_buffers()  # waits for copies on their way
    zero.micro_step_id = -1  # the next backward is the first of a step: it replaces sums in place of adding to them
    zero._offload_accumulated_param_ids = set()
    for buffer in zero.accumulated_grads_in_cpu.values():
        buffer.zero_()
    for flat in zero.single_partition_of_fp32_groups:
        if flat.grad is not None:
            flat.grad.zero_()
