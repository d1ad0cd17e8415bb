"""The owner's end of one data worker: its process, its pipe, its board, and the job that it is at."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.context import ForkServerContext, ForkServerProcess

from vlm_dist.data.types import MicroBatchJob
from vlm_dist.data.workers.case import Case, Loss
from vlm_dist.data.workers.process import run_worker
from vlm_dist.data.workers.progress import Board, Note
from vlm_dist.data.workers.transport import Parcel, Receiver

START_SECONDS = 600.0  # importing torch from a busy network file system takes minutes
END_SECONDS = 5.0


@dataclass(eq=False, slots=True)
class Task:
    """A job that was asked for."""

    job: MicroBatchJob
    case: Case
    result: Future[Parcel] = field(default_factory=Future)


@dataclass(eq=False, slots=True)
class Worker:
    """One process.

    Attributes:
        began: when it was given its task, or was started; monotonic seconds.
        task: what it is at.
        is_ready: it can be given jobs.
        has_worked: it has given a result.
        memory_limit_bytes: beyond which it is replaced; 0 until it is known.
        replaces: the worker that leaves when this one is ready.
        is_leaving: it gets no more jobs.
    """

    process: ForkServerProcess
    pipe: connection.Connection
    receiver: Receiver
    board: Board
    began: float
    task: Task | None = None
    is_ready: bool = False
    has_worked: bool = False
    memory_limit_bytes: int = 0
    replaces: Worker | None = None
    is_leaving: bool = False

    def give(self, task: Task) -> None:
        """Hand it a job; a worker that died just now is noticed when its result is taken."""
        self.task = task
        self.began = time.monotonic()
        try:
            self.pipe.send((task.case.next_job(task.job), self.receiver.take_released()))
        except OSError:
            return

    @property
    def deadline(self) -> float | None:
        """When what it is at has taken too long; None: nothing is expected of it."""
        if not self.is_ready:
            return self.began + START_SECONDS
        if self.task is None:
            return None
        note = self.board.read()
        return max(note.since, self.began) + self.task.case.limit_seconds(note)

    def is_late(self) -> bool:
        """Whether its time is over; asks twice, since it may go on to the next sample between two looks."""
        for _ in range(2):
            deadline = self.deadline
            if deadline is None or time.monotonic() < deadline:
                return False
        return True

    def end(self, *, hangs: bool = False) -> Loss:
        """Kill the process, if it still lives.

        Args:
            hangs: its time is over; else it has died, or is not needed any more.
        """
        before = self.board.read()
        self.process.kill()
        self.process.join(timeout=END_SECONDS)
        self.pipe.close()
        note = self.board.read()
        if hangs and note != before:
            note = Note(None, note.phase, note.since)  # it came back in the last moment: no sample is to blame
        return Loss(note, None if hangs else self.process.exitcode, time.monotonic() - self.began)


def start_worker(context: ForkServerContext, payload: bytes) -> Worker:
    """Start a process that makes micro-batches.

    Raises:
        OSError: processes cannot be started on this machine.
    """
    for is_last in (False, False, True):
        ours, theirs = context.Pipe()
        board = Board()
        process = context.Process(target=run_worker, args=(theirs, payload, board), name="data-worker", daemon=True)
        try:
            process.start()
        except (OSError, EOFError):
            # the fork server itself may have just been ended by a signal to the process group
            ours.close()
            if is_last:
                raise
            time.sleep(0.5)
            continue
        finally:
            theirs.close()  # the worker alone holds it, so that its death ends the pipe
        return Worker(process, ours, Receiver(ours), board, time.monotonic())
    raise AssertionError("unreachable")
