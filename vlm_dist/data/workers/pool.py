"""Worker processes that make micro-batches: stateless, so that a dead one is replaced and its job done again.

Not an executor of the standard library: that one takes all jobs down with one dead worker, cannot tell which job it was
at, and waits for ever for the rest of a large result whose sender was killed. Here every worker has a pipe and at most
one job of its own, and is the process that can be killed when a decoder does not come back.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import connection
from multiprocessing.context import ForkServerContext

from torch import Tensor

from vlm_dist.data.types import MicroBatch, MicroBatchJob
from vlm_dist.data.workers.allocator import keep_freed_memory
from vlm_dist.data.workers.case import Case, Loss
from vlm_dist.data.workers.handle import END_SECONDS, Task, Worker, start_worker
from vlm_dist.data.workers.process import READY, Materialise, unpack
from vlm_dist.errors import DataError

log = logging.getLogger(__name__)

#: So many workers that die one after the other before their first result: they cannot work on this machine.
MAX_EARLY_DEATHS = 6

_PRELOADED = ["vlm_dist.data.materialise", "transformers.processing_utils", "pyarrow.ipc"]


class PoolClosedError(Exception):
    """The pool was closed while a job was waited for; the feed's thread ends on it."""


class WorkerPool:
    """Makes micro-batches in worker processes, or in this one.

    Workers are forked by a server process that has imported what they need, but has neither threads nor a GPU context
    of the trainer. A worker ends with the process that owns the pool, however that ends. Several threads may submit.

    A sample that ends its worker, or is decoded for longer than it may, is tried once more on another worker; then the
    job is done with an empty slot in its place. The outcome does not depend on the number of workers, but that without
    workers (0) nothing of this holds: the calling process decodes, and dies or hangs with the decoder.

    Args:
        materialise: what a worker does; sent to every worker once, so picklable.
        num_workers: 0 does the work in the calling process, when a result is asked for.
        sample_timeout_seconds: how long one sample may be decoded, rendered and encoded. Reading it is not counted:
            storage has retries of its own.
        max_memory_bytes: a worker whose own memory has grown beyond this (decoders leak) is replaced between two jobs,
            by one that is ready by then; None: never. It is at least twice what the worker had after its first job.
        pin_memory: put results into page-locked memory, from which a GPU copies while the CPU goes on; needs a GPU.
    """

    def __init__(
        self,
        materialise: Materialise,
        num_workers: int,
        *,
        sample_timeout_seconds: float = 60.0,
        max_memory_bytes: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._materialise = materialise
        if num_workers == 0:
            keep_freed_memory()
        self._sample_timeout_seconds = sample_timeout_seconds
        self._max_memory_bytes = max_memory_bytes
        self._closed = False
        self._failure: Exception | None = None  # why no job can be done any more
        self._lock = threading.Lock()
        self._waiting: deque[Task] = deque()
        self._thread: threading.Thread | None = None
        self._woken, self._wake = os.pipe()
        self._is_pipe_left = False  # to the thread, which closes it when it ends
        self._has_ended = False  # the thread
        self._workers: list[Worker] = []  # of the thread alone
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
        task = Task(job, Case(self._sample_timeout_seconds))
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
            self._thread.join(timeout=2 * END_SECONDS)
        with self._lock:
            # a thread that is still starting a worker looks at the pipe afterwards, which must not be another file then
            self._is_pipe_left = self._thread is not None and not self._has_ended
            if not self._is_pipe_left:
                self._close_pipe()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _close_pipe(self) -> None:
        os.close(self._wake)
        os.close(self._woken)

    def _make_here(self, job: MicroBatchJob) -> MicroBatch:
        if self._closed:
            raise PoolClosedError
        return self._materialise(job)

    def _run(self) -> None:
        """Run in the thread: hand out jobs, take results, replace the dead and the swollen."""
        # the fork server and its workers inherit it: a signal to the process group is for the owner alone
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})
        try:
            payload = pickle.dumps(self._materialise, 5)
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(_PRELOADED)
            while not self._closed:
                self._fill_up(context, payload)
                self._hand_out()
                for worker in self._wait():
                    if not self._take_result(worker):
                        self._lose(worker)
                    elif worker.has_worked:
                        self._check_memory(worker, context, payload)
            self._fail_all(PoolClosedError())
        except Exception as error:  # noqa: BLE001 - given to all who wait
            self._fail_all(error)
        finally:
            for worker in self._workers:
                worker.end()
            self._workers = []
            with self._lock:
                self._has_ended = True
                if self._is_pipe_left:
                    self._close_pipe()

    def _fill_up(self, context: ForkServerContext, payload: bytes) -> None:
        """Part with workers that leave, and have as many others as there should be."""
        for worker in [worker for worker in self._workers if worker.is_leaving and worker.task is None]:
            self._workers.remove(worker)
            worker.end()
        serving = sum(not worker.is_leaving and worker.replaces is None for worker in self._workers)
        for _ in range(self.num_workers - serving):
            if self._closed:
                return
            self._workers.append(start_worker(context, payload))

    def _hand_out(self) -> None:
        for worker in self._workers:
            if not worker.is_ready or worker.is_leaving or worker.task is not None:
                continue
            with self._lock:
                if not self._waiting:
                    return
                task = self._waiting.popleft()
            worker.give(task)

    def _wait(self) -> list[Worker]:
        """Wait for results, deaths, deadlines, or new jobs."""
        deadlines = [deadline for worker in self._workers if (deadline := worker.deadline) is not None]
        # A worker that goes on to its next sample does not wake us: its note is looked at in time for that one's end.
        timeout = min(self._sample_timeout_seconds, max(0.0, min(deadlines) - time.monotonic())) if deadlines else None
        ready = connection.wait([self._woken, *(worker.pipe for worker in self._workers)], timeout)
        if self._woken in ready:
            os.read(self._woken, 65536)
        return [worker for worker in self._workers if worker.pipe in ready or worker.is_late()]

    def _take_result(self, worker: Worker) -> bool:
        """Take a worker's result; False if it has died, or hangs."""
        if not worker.pipe.poll():
            return False  # its time is over
        try:
            if worker.is_ready:
                parcel = worker.receiver.receive()
            else:
                assert worker.pipe.recv_bytes() == READY
        except (EOFError, OSError):
            return False
        if not worker.is_ready:
            worker.is_ready = True
            if worker.replaces is not None:
                worker.replaces.is_leaving, worker.replaces = True, None
            return True
        task, worker.task = worker.task, None
        assert task is not None
        self._num_early_deaths = 0
        worker.has_worked = True
        task.result.set_result(parcel)
        return True

    def _check_memory(self, worker: Worker, context: ForkServerContext, payload: bytes) -> None:
        """Start the successor of a worker that has grown too much, which works on until that is ready."""
        used, limit = worker.board.memory_bytes, self._max_memory_bytes
        if limit is None or worker.is_leaving:
            return
        if not worker.memory_limit_bytes:
            worker.memory_limit_bytes = max(limit, 2 * used)
        if used <= worker.memory_limit_bytes or any(other.replaces is not None for other in self._workers):
            return
        log.info("a data worker has grown to %.1f GiB; a fresh one takes its place", used / 2**30)
        successor = start_worker(context, payload)
        successor.replaces = worker
        self._workers.append(successor)

    def _lose(self, worker: Worker) -> None:
        """Bury a worker; its job is done again, first of all, unless it has been tried often enough."""
        self._workers.remove(worker)
        for other in self._workers:
            if other.replaces is worker:
                other.replaces = None
        loss = worker.end(hangs=worker.is_late() and not worker.pipe.poll())
        task = worker.task
        blames_sample = task is not None and loss.blames_sample
        # a signal to the whole process group ends all workers at once: that says nothing about the machine
        self._num_early_deaths += not worker.has_worked and not blames_sample
        if task is not None:
            task.case.add(loss)
            if task.case.is_hopeless:
                self._num_early_deaths = 0  # the job is to blame, not the machine
                task.result.set_exception(self._give_up(task, loss))
                return
            with self._lock:
                self._waiting.appendleft(task)
        if self._num_early_deaths >= max(MAX_EARLY_DEATHS, 2 * self.num_workers):
            raise DataError(
                f"{self._num_early_deaths} data workers in a row were lost before their first result, the last one "
                f"{loss}; look for their own messages above, and try dataloader_num_workers 0"
            )
        at = f" at {self._name(task.job, loss.note.slot)}" if task is not None and loss.note.slot is not None else ""
        log.warning("a data worker %s%s; it is replaced%s", loss, at, ", its samples are read again" if task else "")

    def _give_up(self, task: Task, loss: Loss) -> DataError:
        case = task.case
        place = f"one micro-batch (step {task.job.step})"
        if case.strikes:
            told = case.tell(lambda slot: self._name(task.job, slot))
            return DataError(
                f"{case.lost_seconds:.0f} s were lost over {place}, to samples that crash or hang their decoder: "
                f"{told}. Take them out of the data, or lower data.sample_timeout_seconds "
                f"({case.sample_timeout_seconds:g})"
            )
        if loss.note.slot is not None and loss.exit_code is None:
            return DataError(
                f"reading {self._name(task.job, loss.note.slot)} did not come to an end, "
                f"{case.num_blameless} times over {place}; look at the storage that it lies on"
            )
        names = ", ".join(self._name(task.job, slot) for slot, ref in enumerate(task.job.refs) if ref is not None)
        return DataError(
            f"a data worker {loss}, {case.num_blameless} times over {place}. One of its samples is likely to blame: "
            f"{names or 'none'}. Look for the worker's last message (out of memory?), and take the sample out of the "
            "data"
        )

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            self._failure = error
            tasks = [worker.task for worker in self._workers if worker.task is not None] + list(self._waiting)
            self._waiting.clear()
        for task in tasks:
            if not task.result.done():
                task.result.set_exception(error)

    def _name(self, job: MicroBatchJob, slot: int) -> str:
        """Name the sample in a slot."""
        name_samples = getattr(self._materialise, "name_samples", None)
        try:
            names: Sequence[str] = name_samples(replace(job, refs=(job.refs[slot],))) if name_samples else ()
        except DataError:  # naming is not worth another failure
            names = ()
        return names[0] if names else str(job.refs[slot])


class PoolJob:
    """A job under way."""

    def __init__(self, pool: WorkerPool, task: Task) -> None:
        self._pool = pool
        self._task = task

    @property
    def lost_seconds(self) -> float:
        """What has been lost over it so far to workers that died or hung."""
        return self._task.case.lost_seconds

    def result(self, timeout_seconds: float | None = None) -> MicroBatch:
        """Wait for the micro-batch, or make it here and now in a pool without workers.

        Args:
            timeout_seconds: how long to wait for workers; None: until it is there.

        Raises:
            TimeoutError: it is not there yet; ask again.
            DataError: the storage fails, or workers are lost over this job again and again.
            PoolClosedError: the pool was closed.
        """
        if self._pool.num_workers == 0:
            batch = self._pool._make_here(self._task.job)
        else:
            batch = unpack(self._task.result.result(timeout_seconds).open())
        return pin(batch) if self._pool.pin_memory else batch


def pin(batch: MicroBatch) -> MicroBatch:
    """Copy the tensors of a micro-batch into page-locked memory."""
    inputs = {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in batch.inputs.items()}
    return replace(batch, inputs=inputs, labels=batch.labels.pin_memory())
