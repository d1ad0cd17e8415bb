"""Asking again, later and later, at times that differ between processes."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from vlm_dist.errors import DataError

ATTEMPTS = 7
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 20.0

_T = TypeVar("_T")

log = logging.getLogger(__name__)


class TransientError(Exception):
    """A request failed in a way that may pass: overload, a time-out, a connection that broke.

    Args:
        message: what happened, without credentials.
        retry_after_seconds: how long the server asks to wait.
    """

    def __init__(self, message: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


def with_backoff(what: str, action: Callable[[], _T], progress: Callable[[], int] = lambda: 0) -> _T:
    """Run a request until it succeeds or has failed too often without getting on.

    Args:
        what: is asked for, for people.
        action: raises a TransientError where another attempt may succeed.
        progress: of the action; a failure after some progress counts as the first one.

    Raises:
        DataError: if all attempts failed.
    """
    attempt, reached = 0, progress()
    while True:
        try:
            return action()
        except TransientError as error:
            if progress() > reached:
                attempt, reached = 0, progress()
            attempt += 1
            if attempt >= ATTEMPTS:
                raise DataError(
                    f"{what}: given up after {ATTEMPTS} attempts: {error}; see that the server is up and reachable "
                    "from this machine, then start again (a run goes on from its checkpoint with train.resume=auto)"
                ) from error
            pause = min(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
            pause = max(pause, min(error.retry_after_seconds, LONGEST_PAUSE_SECONDS))
            log.info("%s: %s; asking again in %.1f s", what, error, pause)
            time.sleep(pause)
