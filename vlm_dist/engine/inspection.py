"""Which parameters had a gradient that is not finite: looked up in the moment in which DeepSpeed finds that out.

Later it is gone, and looking before every step would make the device wait. What costs anything happens in a step whose
gradient is not finite, and in no other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlm_dist.engine.offloaded_sums import offloads
from vlm_dist.engine.partitions import Partitions, is_bf16_optimizer


class GradientInspector:
    """Stands between DeepSpeed's finding and its throwing the gradient away.

    Args:
        zero_optimizer: of the DeepSpeed engine.
        stage: of ZeRO.
        partitions: who owns what.
        rank: of this process.

    Attributes:
        names: parameters of which this rank's share of the last step's gradient is not finite.
        is_scale_search: float16: the loss scale was lowered, which says nothing of the run's health.
    """

    def __init__(self, zero_optimizer: Any, stage: int, partitions: Partitions, rank: int) -> None:
        self._zero = zero_optimizer
        self._stage = stage
        self._partitions = partitions
        self._rank = rank
        self.names: tuple[str, ...] = ()
        self.is_scale_search = False
        if is_bf16_optimizer(zero_optimizer):
            self._look_before("clear_hp_grads", lambda *args: bool(zero_optimizer.overflow))
        elif hasattr(zero_optimizer, "_update_scale"):
            self._look_before("_update_scale", lambda has_overflow=False: bool(has_overflow))
        scaler = self._scaler
        if scaler is not None:
            scaler.raise_error_at_min_scale = False  # our own count ends the run, with a message

    def begin_step(self) -> None:
        """Forget the step before."""
        self.names, self.is_scale_search = (), False

    def _look_before(self, method: str, is_due: Callable[..., bool]) -> None:
        original = getattr(self._zero, method)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if is_due(*args, **kwargs) and not self.names:
                self.names = self._not_finite()
                scaler = self._scaler
                self.is_scale_search = scaler is not None and scaler.cur_scale > scaler.min_scale
            return original(*args, **kwargs)

        setattr(self._zero, method, wrapped)

    @property
    def _scaler(self) -> Any | None:
        scaler = getattr(self._zero, "loss_scaler", None)
        return scaler if scaler is not None and scaler.dynamic else None

    @torch.no_grad()
    def _not_finite(self) -> tuple[str, ...]:
        gradients = self._local_gradients()
        found: dict[str, None] = {}
        for piece in self._partitions.pieces(self._rank):
            flat = gradients[piece.flat]
            if flat is not None and not flat[piece.flat_start : piece.flat_start + piece.num_elements].isfinite().all():
                found[piece.name] = None
        return tuple(found)

    def _local_gradients(self) -> list[Tensor | None]:
        """This rank's share of the gradient, laid out like its flat masters; None where there is none."""
        zero = self._zero
        if self._stage == 0:
            return [flat.grad for flat in zero.flats]
        if is_bf16_optimizer(zero):
            return [flat.view(-1) for flat in zero.fp32_groups_gradient_flat_partition]
        if offloads(zero):
            return [flat.grad for flat in zero.single_partition_of_fp32_groups]
        if self._stage == 3 and zero.offload_optimizer:
            return [flat.grad for flat in zero.fp32_partitioned_groups_flat]
        parts = [zero.averaged_gradients.get(flat) for flat in range(len(self._partitions.flats))]
        return [torch.cat([tensor.reshape(-1) for tensor in part]) if part else None for part in parts]
