"""The agreement of a step, and stages that any rank may fail."""

import time

import pytest

from tests.ranks import Ranks, run_ranks
from vlm_dist.distributed.agreement import StepAgreement
from vlm_dist.distributed.failures import agree_on_failure
from vlm_dist.errors import ConfigError, DataError, DistributedError

FIELDS = ("stop", "tokens")


def vote_ahead(ranks: Ranks) -> list[tuple[list[int], int]]:
    agreement = StepAgreement(FIELDS, ranks.agreement, ranks.world_size)
    pending = [agreement.vote(step, {"tokens": ranks.rank + 10 * step}) for step in range(3)]
    ranks.any(False)  # the decision group is free while votes are under way
    verdicts = [p.wait() for p in pending]
    return [(v.per_rank["tokens"], v.total["stop"]) for v in verdicts]


def test_every_rank_sees_every_vote() -> None:
    for seen in run_ranks(vote_ahead, 3):
        assert seen == [([0, 1, 2], 0), ([10, 11, 12], 0), ([20, 21, 22], 0)]


def vote_out_of_step(ranks: Ranks) -> str:
    agreement = StepAgreement(FIELDS, ranks.agreement, ranks.world_size)
    try:
        agreement.vote(ranks.rank, {}).wait()
    except DistributedError as error:
        return str(error)
    return ""


def test_ranks_at_different_steps_are_noticed() -> None:
    assert all("different steps: [0, 1]" in message for message in run_ranks(vote_out_of_step, 2))


def fail_on_one_rank(ranks: Ranks) -> tuple[str, str]:
    started = time.monotonic()
    try:
        with agree_on_failure(ranks):
            if ranks.rank == 1:
                raise DataError("no shards in /nowhere")
    except DataError as error:
        assert time.monotonic() - started < 10
        return type(error).__name__, str(error)
    return "", ""


def test_one_rank_fails_and_all_say_why() -> None:
    first, second = run_ranks(fail_on_one_rank, 2)
    assert first == ("DataError", "rank 1: no shards in /nowhere")
    assert second == ("DataError", "no shards in /nowhere")


def fail_everywhere(ranks: Ranks) -> str:
    try:
        with agree_on_failure(ranks):
            raise ConfigError("typo")
    except ConfigError as error:
        return str(error)


def test_a_failure_of_all_ranks_is_told_once_and_plainly() -> None:
    assert run_ranks(fail_everywhere, 2) == ["typo", "typo"]


def objects(ranks: Ranks) -> tuple[list[int], str, bool]:
    return (
        ranks.gather_objects(ranks.rank),
        ranks.broadcast_object("a" if ranks.is_main else None),
        ranks.any(ranks.rank == 1),
    )


def test_objects_and_flags() -> None:
    assert run_ranks(objects, 2) == [([0, 1], "a", True)] * 2


def test_alone_no_process_group_is_needed() -> None:
    verdict = StepAgreement(FIELDS).vote(7, {"stop": 1}).wait()
    assert verdict.step == 7
    assert verdict.ranks_with("stop") == [0]
    assert verdict.total == {"stop": 1, "tokens": 0}


def test_a_misspelled_field_is_refused() -> None:
    with pytest.raises(ValueError, match="stpo"):
        StepAgreement(FIELDS).vote(0, {"stpo": 1})
