"""What DeepSpeed's optimizers keep from one step to the next, and what has to be done about it by hand."""

from __future__ import annotations

from typing import Any

import torch

from vlm_dist.engine.offloaded_sums import forget_sums, offloads
from vlm_dist.engine.partitions import is_bf16_optimizer


def forget_gradients(zero: Any, stage: int) -> None:
    """Forget what was accumulated since the last step, in all the places where it is held.

    Args:
        zero: the optimizer that DeepSpeed has wrapped around ours.
        stage: of ZeRO.
    """
    zero.zero_grad(set_to_none=True)
    if is_bf16_optimizer(zero):
        zero.clear_hp_grads()
    elif stage in (1, 2):
        zero._release_preflattened_grad_buffers()
        for gradients in (zero.averaged_gradients, zero.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))
    forget_kept_gradients(zero, stage)


def forget_kept_gradients(zero: Any, stage: int) -> None:
    """Zero what DeepSpeed keeps of a gradient after a step.

    ZeRO-3 never zeroes a parameter's gradient partition: one that gets no gradient in the next step (a vision adapter
    in a step of text) would silently be updated with this one's again.
    """
    if offloads(zero):
        forget_sums(zero)
    if stage < 3:
        return
    zero.grad_partitions_flat_buffer.zero_()
    for flat in zero.fp32_partitioned_groups_flat:
        if flat.grad is not None:  # kept with optimizer offload
            flat.grad.zero_()


@torch.no_grad()
def round_masters_into_weights(zero: Any, stage: int) -> None:
    """Round the float32 masters into the weights that the model computes with. Collective."""
    if stage < 3:
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for sub_group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(sub_group)
    if zero.persistent_parameters:  # small ones stay gathered between the steps
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    zero.invalidate_secondary_tensor()
