"""A stage that any rank may fail, left by all ranks together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vlm_dist.distributed.group import Ranks
from vlm_dist.distributed.signals import AskedToStop, describe_stop
from vlm_dist.errors import VlmDistError

#: What went wrong on a rank, as the others need it: the error's type and message.
Failure = tuple[type[VlmDistError], str]


@contextmanager
def agree_on_failure(ranks: Ranks, *, leaves_if_asked: bool = False) -> Iterator[None]:
    """Raise on every rank if the enclosed local work failed on any. Collective: every rank enters and leaves it.

    The enclosed work must not itself contain collectives: a rank that failed before one would not take part in it.
    All ranks raise the error of the first rank that failed, so that one clear message comes out. Work that may take
    longer than a collective waits belongs in `vlm_dist.distributed.patience.long_work`.

    Args:
        ranks: this process among its peers.
        leaves_if_asked: all ranks leave, too, if any was asked to stop.

    Raises:
        VlmDistError: the first failing rank's error.
        AskedToStop: on every rank, with `leaves_if_asked`.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - re-raised below, after the others know
        failure = error
    told = ranks.gather_objects((describe_failure(failure), ranks.stop.number))
    raise_first(ranks, [failed for failed, _ in told], failure)
    asked = [number for _, number in told]
    if leaves_if_asked and any(asked):
        raise AskedToStop(describe_stop(asked))


def describe_failure(failure: Exception | None) -> Failure | None:
    """Say what the others are told; None where all is well."""
    if failure is None:
        return None
    return (type(failure), str(failure)) if isinstance(failure, VlmDistError) else (VlmDistError, repr(failure))


def raise_first(ranks: Ranks, failures: Sequence[Failure | None], mine: Exception | None) -> None:
    """Raise the first rank's failure, if there is any.

    Args:
        ranks: this process among its peers.
        failures: of every rank, by `describe_failure`.
        mine: this rank's own; one that is a bug of ours is raised here as it is, with its traceback.
    """
    first = next((rank for rank, failure in enumerate(failures) if failure is not None), None)
    if first is None:
        return
    if mine is not None and (first == ranks.rank or not isinstance(mine, VlmDistError)):
        raise mine
    found = failures[first]
    assert found is not None
    kind, message = found
    raise kind(message if failures.count(found) == len(failures) else f"rank {first}: {message}")
