"""hpZ's second set of shards: each node keeps the whole model once more, so that gathering stays inside the node.

With LoRA the frozen base never changes, so its second shards stay right for the whole run. Users of DeepSpeed have seen
wrong losses with it all the same, so a run that uses it begins with a trial: each weight, gathered both ways, has to be
the same bit for bit. That is every weight a forward and a backward can meet, and it needs no batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from vlm_dist.errors import ConfigError

#: Gathered at a time.
_CHUNK_ELEMENTS = 20_000_000
_OPTION = "zero_optimization.zero_hpz_partition_size"


def uses_secondary_shards(ds_config: Mapping[str, Any]) -> bool:
    """Whether the configuration asks for hpZ."""
    zero = ds_config["zero_optimization"]
    return bool(zero["stage"] == 3 and zero.get("zero_hpz_partition_size", 1) > 1)


@torch.no_grad()
def check_secondary_shards(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Gather each partitioned weight from all ranks and from the node, and compare. Collective: every rank calls this.

    Args:
        module: under ZeRO-3 with hpZ.
        group: gloo, of all ranks.

    Raises:
        ConfigError: on every rank: weights differ.
    """
    differing: list[tuple[str, float]] = []
    for names, parameters in _chunks(module):
        for parameter in parameters:
            parameter.ds_secondary_tensor = None
        plain = _gathered(parameters)
        second = _gathered(parameters)
        for name, left, right in zip(names, plain, second, strict=True):
            if not torch.equal(left, right):
                differing.append((name, float((left.float() - right.float()).abs().max())))
    by_rank: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(by_rank, (len(differing), differing[:1]), group=group)
    for rank, (count, example) in enumerate(by_rank):
        if count:
            (name, deviation) = example[0]
            raise ConfigError(
                f"{_OPTION}: on rank {rank}, {count} weights gathered inside the node are not those of the model "
                f"(e.g. {name}, by {deviation:.2e}); remove the option"
            )


def check_nothing_stale(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """After an update the second shards of what was updated must be gone. Collective: every rank calls this.

    Args:
        parameters: the trainable ones.
        group: gloo, of all ranks.

    Raises:
        ConfigError: on every rank: the next forward would compute with weights of before the update.
    """
    stale = torch.tensor(sum(getattr(p, "ds_secondary_tensor", None) is not None for p in parameters))
    dist.all_reduce(stale, op=dist.ReduceOp.MAX, group=group)
    if stale:
        raise ConfigError(
            f"{_OPTION}: {int(stale)} trainable weights keep shards of before the update in this version of DeepSpeed; "
            "remove the option"
        )


def _gathered(parameters: list[Any]) -> list[torch.Tensor]:
    """What a forward would compute with."""
    parameters[0].all_gather_coalesced(parameters).wait()
    whole = [parameter.detach().clone() for parameter in parameters]
    parameters[0].partition(parameters)  # which makes the second shards, where there are none
    return whole


def _chunks(module: nn.Module) -> Iterator[tuple[list[str], list[Any]]]:
    """Partitioned parameters, some at a time, in the same order on all ranks; small ones are never partitioned."""
    names: list[str] = []
    parameters: list[Any] = []
    for name, parameter in module.named_parameters():
        if getattr(parameter, "ds_persist", True):
            continue
        names.append(name)
        parameters.append(parameter)
        if sum(p.ds_numel for p in parameters) > _CHUNK_ELEMENTS:
            yield names, parameters
            names, parameters = [], []
    if parameters:
        yield names, parameters
