"""The thread that writes checkpoints while training goes on. It takes part in no collective."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from vlm_dist.errors import CheckpointError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WriteFailure:
    """Why something could not be written.

    Attributes:
        step: of the checkpoint.
        message: for the user.
    """

    step: int
    message: str


class CheckpointWriter:
    """Does one job after the other, in a thread of its own, which starts with the first job.

    A job that fails leaves a failure that stays until it is taken; the jobs after it are done all the same.
    """

    def __init__(self) -> None:
        self._jobs: deque[tuple[int, Callable[[], None]]] = deque()
        self._is_busy = False
        self._changed = threading.Condition()
        self._failure: WriteFailure | None = None
        self._thread: threading.Thread | None = None

    @property
    def has_failed(self) -> bool:
        """Whether a failure waits to be taken."""
        return self._failure is not None

    def submit(self, step: int, job: Callable[[], None]) -> None:
        """Have something written behind what is being written.

        Args:
            step: of the checkpoint that it belongs to.
            job: raises `CheckpointError` where it fails.
        """
        with self._changed:
            self._jobs.append((step, job))
            self._changed.notify_all()
        if self._thread is None:
            # a daemon: a process that is told to end at once leaves a directory that is not published
            self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Block until everything is written, or has failed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs and not self._is_busy)

    def take_failure(self) -> WriteFailure | None:
        """The first failure since the last call, if there is one."""
        failure, self._failure = self._failure, None
        return failure

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs))
                step, job = self._jobs.popleft()
                self._is_busy = True
            try:
                job()
            except CheckpointError as error:
                self._failure = self._failure or WriteFailure(step, str(error))
            except Exception as error:  # a bug: told, for a run without checkpoints must not go on
                log.exception("the checkpoint of step %d could not be written", step)
                self._failure = self._failure or WriteFailure(step, f"checkpoint of step {step}: {error!r}")
            del job  # it holds the tensors
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()
