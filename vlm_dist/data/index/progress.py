"""Shows how far work over many shards has come: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress

_LINE_SECONDS = 10.0
_QUIET_SECONDS = 1.0  # what is done sooner needs no bar

log = logging.getLogger(__name__)


class ShardProgress:
    """Counts shards that are done.

    Args:
        doing: a word for people, such as "indexing".
        num_shards: how many there are; `start` may correct it.
    """

    def __init__(self, doing: str, num_shards: int = 0) -> None:
        self._doing = doing
        self._num_shards = num_shards
        self._num_done = 0
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self._start = self._last_line = time.monotonic()
        self._is_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, num_shards: int) -> Callable[[], None]:
        """Set how many shards there are; gives back what to call after each."""
        self._num_shards = num_shards
        return self.advance

    def advance(self) -> None:
        """One shard more is done."""
        self._num_done += 1
        now = time.monotonic()
        if self._is_terminal:
            if self._bar is None and now - self._start > _QUIET_SECONDS:
                self._show_bar()
            if self._bar is not None:
                self._bar.update(self._task, completed=self._num_done)
        elif now - self._last_line > _LINE_SECONDS:
            self._last_line = now
            left = (now - self._start) / self._num_done * (self._num_shards - self._num_done)
            log.info("%s: %d of %d shards, about %.0f s left", self._doing, self._num_done, self._num_shards, left)

    def _show_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn(f"{self._doing} shards"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("", total=self._num_shards, completed=self._num_done)
        self._bar.start()
