"""Worker processes that make micro-batches: stateless, so that a dead one is replaced and its jobs done again.

Micro-batches come back as plain bytes through the executor's pipe: torch's own way of sending tensors would keep file
descriptors open in both processes, and lose tensors when a worker dies.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import connection

import numpy as np
import torch
from torch import Tensor

from vlm_dist.data.types import MicroBatch, MicroBatchJob
from vlm_dist.errors import DataError, VlmDistError

log = logging.getLogger(__name__)

Materialise = Callable[[MicroBatchJob], MicroBatch]

#: A job is done at most so often: once in company and then alone, so that it is not blamed for another's crash.
MAX_ATTEMPTS = 3

_PROTOCOL = 5
_PRELOADED = ["vlm_dist.data.materialise", "transformers.processing_utils"]


class PoolClosedError(Exception):
    """The pool was closed while a job was waited for; the feed's thread ends on it."""


class WorkerPool:
    """Makes micro-batches in worker processes, or in this one.

    Workers are forked by a server process that has imported what they need, but has neither threads nor a GPU context
    of the trainer. A worker ends with the process that owns the pool, however that ends.

    Args:
        materialise: what a worker does; sent to every worker once, so picklable.
        num_workers: 0 does the work in the calling process, when a result is asked for.
        job_timeout_seconds: a worker that takes longer hangs (some broken videos do that to decoders) and is replaced.
        pin_memory: put results into page-locked memory, from which a GPU copies while the CPU goes on; needs a GPU.
    """

    def __init__(
        self,
        materialise: Materialise,
        num_workers: int,
        *,
        job_timeout_seconds: float = 600.0,
        pin_memory: bool = False,
    ) -> None:
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._materialise = materialise
        self._timeout_seconds = job_timeout_seconds
        self._lock = threading.Lock()
        self._closed = False
        self._executor: ProcessPoolExecutor | None = None
        self._payload = pickle.dumps(materialise, _PROTOCOL) if num_workers > 0 else b""

    def submit(self, job: MicroBatchJob) -> PoolJob:
        """Start a job.

        Raises:
            PoolClosedError: the pool is closed.
        """
        if self.num_workers == 0:
            return PoolJob(self, job, None)
        return PoolJob(self, job, self._start(job))

    def close(self) -> None:
        """End the workers, also in the middle of a job; what waits for a result gets a PoolClosedError."""
        with self._lock:
            self._closed = True
            executor, self._executor = self._executor, None
        if executor is not None:
            _end(executor)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self, job: MicroBatchJob) -> Future[bytes]:
        """Hand a job to the workers; a pool that broke meanwhile is replaced."""
        with self._lock:
            for _ in range(MAX_ATTEMPTS):
                if self._closed:
                    raise PoolClosedError
                if self._executor is None:
                    self._executor = self._make_executor()
                try:
                    return self._executor.submit(_run, job)
                except BrokenProcessPool:
                    executor, self._executor = self._executor, None
                    _end(executor)
        raise DataError(
            "data workers die as soon as they are started; their messages are above; try dataloader_num_workers 0"
        )

    def _make_executor(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        return ProcessPoolExecutor(self.num_workers, context, initializer=_initialise, initargs=(self._payload,))

    def _finish(self, job: MicroBatchJob, future: Future[bytes] | None) -> MicroBatch:
        if future is None:
            if self._closed:
                raise PoolClosedError
            return self._materialise(job)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return unpack(future.result(self._timeout_seconds))
            except (BrokenProcessPool, CancelledError, TimeoutError) as error:
                if self._closed:
                    raise PoolClosedError from error
                hangs = isinstance(error, TimeoutError)
                what = f"did not answer for {self._timeout_seconds:g} s" if hangs else "died"
                self._discard(future)
                if attempt == MAX_ATTEMPTS:
                    raise DataError(
                        f"a data worker {what} {attempt} times over the same micro-batch (step {job.step}); one of its "
                        f"samples is likely to blame: {self._name_samples(job)}. Look for the worker's last message "
                        "(out of memory? a damaged video?), and take the sample out of the data"
                    ) from error
                log.warning("a data worker %s; it is replaced, and step %d's samples are read again", what, job.step)
                future = self._start(job)
        raise AssertionError("unreachable")

    def _discard(self, future: Future[bytes]) -> None:
        """Drop the executor that a lost job ran on, unless another lost job of it has done so already."""
        with self._lock:
            executor = self._executor
            if executor is None or not (_is_broken(executor) or not future.done()):
                return
            self._executor = None
        _end(executor)

    def _name_samples(self, job: MicroBatchJob) -> str:
        name_samples = getattr(self._materialise, "name_samples", None)
        names = name_samples(job) if name_samples else [str(ref) for ref in job.refs if ref is not None]
        return ", ".join(names) or "none"


class PoolJob:
    """A job under way."""

    def __init__(self, pool: WorkerPool, job: MicroBatchJob, future: Future[bytes] | None) -> None:
        self._pool = pool
        self._job = job
        self._future = future

    def result(self) -> MicroBatch:
        """Wait for the micro-batch, or make it here and now in a pool without workers.

        Raises:
            DataError: the storage fails, or workers die over this job again and again.
            PoolClosedError: the pool was closed.
        """
        batch = self._pool._finish(self._job, self._future)
        return pin(batch) if self._pool.pin_memory else batch


def pin(batch: MicroBatch) -> MicroBatch:
    """Copy the tensors of a micro-batch into page-locked memory."""
    inputs = {name: tensor.pin_memory() for name, tensor in batch.inputs.items()}
    return replace(batch, inputs=inputs, labels=batch.labels.pin_memory())


def pack(batch: MicroBatch) -> bytes:
    """Turn a micro-batch into bytes."""
    arrays = {name: _to_array(tensor) for name, tensor in batch.inputs.items()}
    return pickle.dumps((arrays, _to_array(batch.labels), replace(batch, inputs={}, labels=None)), _PROTOCOL)  # type: ignore[arg-type]


def unpack(data: bytes) -> MicroBatch:
    """Undo `pack`, bit for bit."""
    arrays, labels, batch = pickle.loads(data)  # noqa: S301 - written by our own worker
    inputs = {name: _to_tensor(array) for name, array in arrays.items()}
    unpacked: MicroBatch = replace(batch, inputs=inputs, labels=_to_tensor(labels))
    return unpacked


def _to_array(tensor: Tensor) -> tuple[np.ndarray, str]:
    """Give a tensor as an array, with its own dtype's name where numpy has no such type."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy(), "bfloat16"
    return tensor.numpy(), ""


def _to_tensor(packed: tuple[np.ndarray, str]) -> Tensor:
    array, dtype = packed
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor.view(getattr(torch, dtype)) if dtype else tensor


def _is_broken(executor: ProcessPoolExecutor) -> bool:
    return bool(getattr(executor, "_broken", False))


def _end(executor: ProcessPoolExecutor) -> None:
    """End an executor without waiting for the jobs that its workers are at."""
    processes = list((getattr(executor, "_processes", None) or {}).values())
    executor.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()
    for process in processes:
        process.join(timeout=5)


# What follows runs in a worker.

_worker_materialise: Materialise | None = None
_worker_failure: str | None = None


def _initialise(payload: bytes) -> None:
    """Set a worker up; a failure is kept for the first job, since an executor would only say that it is broken."""
    global _worker_materialise, _worker_failure
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's business
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_owner, name="owner-watch", daemon=True).start()
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    try:
        from transformers.dynamic_module_utils import init_hf_modules

        init_hf_modules()  # where processors with remote code are found
        _worker_materialise = pickle.loads(payload)  # noqa: S301 - written by the owner
    except Exception as error:  # noqa: BLE001 - told by _run, with its type
        _worker_failure = f"{type(error).__name__}: {error}"


def _end_with_owner() -> None:
    owner = multiprocessing.parent_process()
    if owner is not None:
        connection.wait([owner.sentinel])
        os._exit(1)


def _run(job: MicroBatchJob) -> bytes:
    if _worker_materialise is None:
        raise DataError(
            f"a data worker could not be set up: {_worker_failure}; dataloader_num_workers 0 works without any"
        )
    try:
        return pack(_worker_materialise(job))
    except VlmDistError:
        raise
    except Exception as error:  # noqa: BLE001 - told to the owner
        # the traceback travels as text: the exception itself may not be picklable, which would break the pool
        import traceback

        print(traceback.format_exc(), file=sys.stderr, flush=True)  # noqa: T201 - a worker has no logger
        raise RuntimeError(f"{type(error).__name__}: {error} (in a data worker; traceback above)") from None
