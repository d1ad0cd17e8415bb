"""Worker processes that make micro-batches: stateless, so that a dead one is replaced and its job done again.

Not an executor of the standard library: that one takes all jobs down with one dead worker, cannot tell which job it was
at, and waits for ever for the rest of a large result whose sender was killed. Here every worker has a pipe and at most
one job of its own.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess

from vlm_dist.data.types import MicroBatch, MicroBatchJob
from vlm_dist.data.workers.process import READY, Materialise, run_worker, unpack
from vlm_dist.errors import DataError

log = logging.getLogger(__name__)

#: A job that a worker died over is done again; that often in all.
MAX_ATTEMPTS = 3
#: So many workers that die one after the other before their first result: they cannot work on this machine.
MAX_EARLY_DEATHS = 6

_PRELOADED = ["vlm_dist.data.materialise", "transformers.processing_utils"]
_START_SECONDS = 600  # importing torch from a busy network file system takes minutes
_END_SECONDS = 5


class PoolClosedError(Exception):
    """The pool was closed while a job was waited for; the feed's thread ends on it."""


@dataclass(eq=False, slots=True)
class _Task:
    job: MicroBatchJob
    result: Future[bytes] = field(default_factory=Future)
    attempts: int = 0


@dataclass(eq=False, slots=True)
class _Worker:
    process: ForkServerProcess
    pipe: connection.Connection
    deadline: float  # monotonic seconds; of the task, or of getting ready
    task: _Task | None = None
    is_ready: bool = False
    has_worked: bool = False

    @property
    def is_due(self) -> bool:
        """Whether something is expected of it."""
        return self.task is not None or not self.is_ready


class WorkerPool:
    """Makes micro-batches in worker processes, or in this one.

    Workers are forked by a server process that has imported what they need, but has neither threads nor a GPU context
    of the trainer. A worker ends with the process that owns the pool, however that ends. Several threads may submit.

    Args:
        materialise: what a worker does; sent to every worker once, so picklable.
        num_workers: 0 does the work in the calling process, when a result is asked for.
        job_timeout_seconds: a worker that takes longer hangs (some broken videos do that to decoders) and is replaced.
            All attempts together must be shorter than the collectives' time-out, or the other ranks give up first.
        pin_memory: put results into page-locked memory, from which a GPU copies while the CPU goes on; needs a GPU.
    """

    def __init__(
        self,
        materialise: Materialise,
        num_workers: int,
        *,
        job_timeout_seconds: float = 240.0,
        pin_memory: bool = False,
    ) -> None:
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._materialise = materialise
        self._timeout_seconds = job_timeout_seconds
        self._closed = False
        self._failure: Exception | None = None  # why no job can be done any more
        self._lock = threading.Lock()
        self._waiting: deque[_Task] = deque()
        self._thread: threading.Thread | None = None
        self._woken, self._wake = os.pipe()
        self._workers: list[_Worker] = []  # of the thread alone
        self._num_early_deaths = 0

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that there are now."""
        return [worker.process.pid for worker in self._workers if worker.process.pid is not None]

    def submit(self, job: MicroBatchJob) -> PoolJob:
        """Start a job.

        Raises:
            PoolClosedError: the pool is closed.
            DataError: workers cannot live on this machine.
        """
        task = _Task(job)
        with self._lock:
            if self._closed:
                raise PoolClosedError
            if self._failure is not None:
                raise self._failure
            if self.num_workers > 0:
                self._waiting.append(task)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="data-workers", daemon=True)
                    self._thread.start()
                os.write(self._wake, b".")
        return PoolJob(self, task)

    def close(self) -> None:
        """End the workers, also in the middle of a job; what waits for a result gets a PoolClosedError."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.write(self._wake, b".")
        if self._thread is not None:
            self._thread.join(timeout=2 * _END_SECONDS)
        os.close(self._wake)
        os.close(self._woken)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _make_here(self, job: MicroBatchJob) -> MicroBatch:
        if self._closed:
            raise PoolClosedError
        return self._materialise(job)

    def _run(self) -> None:
        """Run in the thread: hand out jobs, take results, replace the dead."""
        try:
            payload = pickle.dumps(self._materialise, 5)
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(_PRELOADED)
            self._workers = [_start(context, payload) for _ in range(self.num_workers)]
            while not self._closed:
                self._hand_out()
                for worker in self._wait():
                    if not self._take_result(worker):
                        self._workers.remove(worker)
                        self._lose(worker)
                        self._workers.append(_start(context, payload))
            self._fail_all(PoolClosedError())
        except Exception as error:  # noqa: BLE001 - given to all who wait
            self._fail_all(error)
        finally:
            for worker in self._workers:
                _end(worker)
            self._workers = []

    def _hand_out(self) -> None:
        for worker in self._workers:
            if not worker.is_ready or worker.task is not None:
                continue
            with self._lock:
                if not self._waiting:
                    return
                task = self._waiting.popleft()
            task.attempts += 1
            worker.task = task
            worker.deadline = time.monotonic() + self._timeout_seconds
            with suppress(OSError):  # a worker that died just now is noticed when its result is taken
                worker.pipe.send(task.job)

    def _wait(self) -> list[_Worker]:
        """Wait for results, deaths, deadlines, or new jobs."""
        deadlines = [worker.deadline for worker in self._workers if worker.is_due]
        timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        ready = connection.wait([self._woken, *(worker.pipe for worker in self._workers)], timeout)
        if self._woken in ready:
            os.read(self._woken, 65536)
        now = time.monotonic()
        return [
            worker for worker in self._workers if worker.pipe in ready or (worker.is_due and now >= worker.deadline)
        ]

    def _take_result(self, worker: _Worker) -> bool:
        """Take a worker's result; False if it has died, or hangs."""
        if not worker.pipe.poll():
            return False  # its time is over
        try:
            data = worker.pipe.recv_bytes()
        except (EOFError, OSError):
            return False
        if not worker.is_ready:
            assert data == READY
            worker.is_ready = True
            return True
        task, worker.task = worker.task, None
        assert task is not None
        self._num_early_deaths = 0
        worker.has_worked = True
        task.result.set_result(data)
        return True

    def _lose(self, worker: _Worker) -> None:
        """Bury a worker; its job is done again, first of all, unless it has been tried often enough."""
        hangs = worker.is_due and time.monotonic() >= worker.deadline
        _end(worker)
        what = "did not answer in time" if hangs else f"died ({_how(worker.process.exitcode)})"
        # a signal to the whole process group ends all workers at once: that says nothing about the machine
        self._num_early_deaths += not worker.has_worked
        task = worker.task
        if task is not None and task.attempts >= MAX_ATTEMPTS:
            self._num_early_deaths = 0  # the job is to blame, not the machine
            task.result.set_exception(
                DataError(
                    f"a data worker {what}, {task.attempts} times over one micro-batch (step {task.job.step}). One "
                    f"of its samples is likely to blame: {self._name_samples(task.job)}. Look for the worker's last "
                    "message (out of memory? a damaged video?), and take the sample out of the data"
                )
            )
            return
        if task is not None:
            with self._lock:
                self._waiting.appendleft(task)
        if self._num_early_deaths >= max(MAX_EARLY_DEATHS, 2 * self.num_workers):
            raise DataError(
                f"{self._num_early_deaths} data workers in a row died before their first result, the last one {what}; "
                "look for their own messages above, and try dataloader_num_workers 0"
            )
        log.warning("a data worker %s; it is replaced%s", what, ", its samples are read again" if task else "")

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            self._failure = error
            tasks = [worker.task for worker in self._workers if worker.task is not None] + list(self._waiting)
            self._waiting.clear()
        for task in tasks:
            if not task.result.done():
                task.result.set_exception(error)

    def _name_samples(self, job: MicroBatchJob) -> str:
        name_samples = getattr(self._materialise, "name_samples", None)
        names: Sequence[str] = (
            name_samples(job) if name_samples is not None else [str(ref) for ref in job.refs if ref is not None]
        )
        return ", ".join(names) or "none"


class PoolJob:
    """A job under way."""

    def __init__(self, pool: WorkerPool, task: _Task) -> None:
        self._pool = pool
        self._task = task

    def result(self) -> MicroBatch:
        """Wait for the micro-batch, or make it here and now in a pool without workers.

        Raises:
            DataError: the storage fails, or workers die over this job again and again.
            PoolClosedError: the pool was closed.
        """
        if self._pool.num_workers == 0:
            batch = self._pool._make_here(self._task.job)
        else:
            batch = unpack(self._task.result.result())
        return pin(batch) if self._pool.pin_memory else batch


def pin(batch: MicroBatch) -> MicroBatch:
    """Copy the tensors of a micro-batch into page-locked memory."""
    inputs = {name: tensor.pin_memory() for name, tensor in batch.inputs.items()}
    return replace(batch, inputs=inputs, labels=batch.labels.pin_memory())


def _start(context: multiprocessing.context.ForkServerContext, payload: bytes) -> _Worker:
    for is_last in (False, False, True):
        ours, theirs = context.Pipe()
        process = context.Process(target=run_worker, args=(theirs, payload), name="data-worker", daemon=True)
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
        return _Worker(process, ours, time.monotonic() + _START_SECONDS)
    raise AssertionError("unreachable")


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join(timeout=_END_SECONDS)
    worker.pipe.close()


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"signal {-exit_code}" + (", as when memory runs out" if exit_code == -9 else "")
    return f"exit code {exit_code}"
