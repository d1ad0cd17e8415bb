"""The debug mode: a rank that issues another collective than the others is an error on all, in seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Ranks, run_ranks
from vlm_dist.distributed.agreement import StepAgreement
from vlm_dist.distributed.collectives import compare_collectives


@pytest.fixture
def _compared() -> Iterator[None]:
    before = os.environ.get("TORCH_DISTRIBUTED_DEBUG")
    compare_collectives()  # the ranks are forks
    yield
    os.environ.pop("TORCH_DISTRIBUTED_DEBUG") if before is None else None
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = before or "OFF"
    dist.set_debug_level_from_env()  # type: ignore[attr-defined]


def take_two_ways(ranks: Ranks) -> tuple[float, str]:
    agreement = StepAgreement(("stop",), ranks.agreement, ranks.world_size)
    assert agreement.vote(0, {}).wait().total == {"stop": 0}  # what all do alike goes on as ever
    started = time.monotonic()
    values = torch.ones(4)
    try:
        if ranks.rank == 1:
            dist.broadcast(values, src=0)
        else:
            dist.all_reduce(values)
    except RuntimeError as error:
        return time.monotonic() - started, str(error)
    return time.monotonic() - started, ""


@pytest.mark.usefixtures("_compared")
def test_ranks_that_issue_different_collectives_are_told_which() -> None:
    for seconds, message in run_ranks(take_two_ways, 2):
        assert seconds < 20
        assert "ALLREDUCE" in message and "BROADCAST" in message
