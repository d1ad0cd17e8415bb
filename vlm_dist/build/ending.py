"""How a run ends that does not end well: one clear message that names rank, step and samples, in time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from vlm_dist.config.train import TrainConfig
from vlm_dist.distributed.group import LostPeerError, Ranks, is_lost_peer
from vlm_dist.distributed.signals import AskedToStop
from vlm_dist.distributed.watchdog import FIRST_USE_SECONDS, Watchdog
from vlm_dist.errors import ExitCode, VlmDistError

#: A collective gives up so much later than the watchdog, which has more to say.
_MARGIN = timedelta(minutes=5)


def collective_timeout(settings: TrainConfig) -> timedelta:
    """How long a rank waits in a collective where even the watchdog does not end it."""
    return timedelta(minutes=settings.hang_timeout_minutes, seconds=FIRST_USE_SECONDS) + _MARGIN


@contextmanager
def told_clearly(settings: TrainConfig, ranks: Ranks) -> Iterator[None]:
    """Watch the enclosed run, and say how it failed, here and to the other ranks. Collective: every rank enters it.

    Raises:
        LostPeerError: another rank is gone; names it, and where it was.
    """
    watchdog = Watchdog(ranks, settings.hang_timeout_minutes * 60, settings.output_dir / "stacks")
    with watchdog:
        try:
            yield
        except AskedToStop:
            raise
        except Exception as error:
            if isinstance(error, LostPeerError) or (isinstance(error, RuntimeError) and is_lost_peer(error)):
                who = watchdog.who_is_gone()
                raise LostPeerError(
                    f"{who} (its own message is above, or on its node): {_first_line(error)}. "
                    "Continue from the newest checkpoint with train.resume=auto",
                    watchdog.exit_code_of_gone(),
                ) from error
            if isinstance(error, VlmDistError):
                watchdog.close(_first_line(error), error.exit_code)
                raise
            what = f"{type(error).__name__}: {_first_line(error)}"
            _say(f"error: rank {ranks.rank} failed at {ranks.progress.mark}: {what}")
            watchdog.close(what, ExitCode.FAILURE)
            raise


def _first_line(error: BaseException) -> str:
    line = (str(error).splitlines() or [""])[0]
    return line.partition(". This is typically caused")[0].rstrip(".")  # gloo has advice for all cases


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - before the traceback, on every rank
