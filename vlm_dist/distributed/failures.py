"""A stage that any rank may fail, left by all ranks together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vlm_dist.distributed.group import Ranks
from vlm_dist.errors import VlmDistError


@contextmanager
def agree_on_failure(ranks: Ranks) -> Iterator[None]:
    """Raise on every rank if the enclosed local work failed on any. Collective: every rank enters and leaves it.

    The enclosed work must not itself contain collectives: a rank that failed before one would not take part in it.
    All ranks raise the error of the first rank that failed, so that one clear message comes out.

    Raises:
        VlmDistError: the first failing rank's error.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - re-raised below, after the others know
        failure = error
    known = failure if isinstance(failure, VlmDistError) else None
    mine = None if failure is None else (type(known or VlmDistError("")), str(known or repr(failure)))
    failures = ranks.gather_objects(mine)
    found = [(rank, *each) for rank, each in enumerate(failures) if each is not None]
    if not found:
        return
    first, kind, message = found[0]
    if failure is not None and known is None:
        raise failure  # a bug of ours keeps its traceback where it happened
    if first == ranks.rank and failure is not None:
        raise failure
    raise kind(message if failures.count(failures[first]) == len(failures) else f"rank {first}: {message}")
