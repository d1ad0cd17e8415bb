"""A step that never happened: what it allocates stays, what it changed is put back, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm_dist.engine.partitions import Partitions

#: What DeepSpeed counts of its steps.
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


class Snapshot:
    """This rank's masters, moments and counters, on the CPU. Local: nothing is asked of other ranks.

    Args:
        deepspeed_engine: whose counters are kept.
        partitions: has the masters.
        optimizer: has the moments; what it has not allocated yet is zero afterwards.
        scaler: of float16, if there is one.
        scaler_fields: what decides when its scale changes next.
    """

    def __init__(
        self,
        deepspeed_engine: Any,
        partitions: Partitions,
        optimizer: torch.optim.Optimizer,
        scaler: Any | None,
        scaler_fields: tuple[str, ...],
    ) -> None:
        self._engine = deepspeed_engine
        self._partitions = partitions
        self._optimizer = optimizer
        self._scaler = scaler
        self._masters = [_copy(flat) for flat in partitions.flats]
        self._states = [
            {key: _copy(value) for key, value in optimizer.state.get(flat, {}).items()} for flat in partitions.flats
        ]
        self._counters = {name: getattr(deepspeed_engine, name) for name in _COUNTERS}
        self._scale = {name: getattr(scaler, name) for name in scaler_fields} if scaler is not None else {}
        self._rates = [group["lr"] for group in optimizer.param_groups]

    @torch.no_grad()
    def put_back(self) -> None:
        """Make all of it as it was."""
        for flat, master, before in zip(self._partitions.flats, self._masters, self._states, strict=True):
            flat.copy_(master)
            for key, value in self._optimizer.state.get(flat, {}).items():
                if isinstance(value, Tensor):
                    value.copy_(before[key]) if key in before else value.zero_()
                else:  # DeepSpeed's CPU Adam counts its steps in a plain integer
                    self._optimizer.state[flat][key] = before.get(key, 0)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        for owner, values in ((self._engine, self._counters), (self._scaler, self._scale)):
            for name, value in values.items():
                setattr(owner, name, value)


def held_bytes(module: nn.Module, partitions: Partitions) -> dict[str, int]:
    """What this rank holds between steps, by part; where no other word is said, on its device.

    Args:
        module: the model.
        partitions: of what is trained.
    """
    weights = sum(_local_bytes(parameter) for parameter in module.parameters())
    num_owned = sum(flat.numel() for flat in partitions.flats)
    return {"weights": weights, "masters": 4 * num_owned, "moments": 8 * num_owned}


def _local_bytes(parameter: Any) -> int:
    kept: Tensor = getattr(parameter, "ds_tensor", parameter)  # under ZeRO-3 this rank's part
    return kept.numel() * kept.element_size()


def _copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
