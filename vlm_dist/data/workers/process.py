"""What runs in a data worker, and the form in which micro-batches come back from it (`transport` has the way).

Torch's own way of sending tensors would keep file descriptors open in both processes and lose tensors when a worker
dies; a pipe that workers share would be blocked for good by one that dies in the middle of a message. So every worker
has a pipe of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import connection
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from vlm_dist.data.types import MicroBatch, MicroBatchJob
from vlm_dist.data.workers import progress
from vlm_dist.data.workers.allocator import keep_freed_memory
from vlm_dist.data.workers.transport import Sender
from vlm_dist.errors import DataError, VlmDistError

Materialise = Callable[[MicroBatchJob], MicroBatch]

#: What a worker sends first.
READY = b""


def run_worker(pipe: connection.Connection, payload: bytes, board: progress.Board) -> None:
    """Make the micro-batches that are asked for until the pipe is closed.

    Args:
        pipe: takes READY, then gives jobs and takes packed results.
        payload: the pickled materialiser.
        board: where it is noted what this worker is at.
    """
    # requests to stop are the owner's business, whose end is a worker's, too
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_owner, name="owner-watch", daemon=True).start()
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    keep_freed_memory()
    progress.attach(board)
    me = psutil.Process()
    materialise = _set_up(payload)
    sender = Sender(pipe)
    pipe.send_bytes(READY)
    while True:
        try:
            job, released = pipe.recv()
        except (EOFError, OSError):
            return
        sender.release(released)
        content = _make(materialise, job)
        progress.between_samples()  # also after an error in the midst of a sample
        memory = me.memory_info()
        # without what it shares with others: the code of the libraries, and files that it has mapped
        board.memory_bytes = memory.rss - getattr(memory, "shared", 0)
        sender.send(content)
        del content  # not held while the next one is made


def _end_with_owner() -> None:
    """A worker must not outlive the trainer, even one that is killed."""
    owner = multiprocessing.parent_process()
    if owner is not None:
        connection.wait([owner.sentinel])
        os._exit(1)


def _set_up(payload: bytes) -> Materialise:
    try:
        from transformers.dynamic_module_utils import init_hf_modules

        init_hf_modules()  # where processors with remote code are found
        materialise: Materialise = pickle.loads(payload)  # noqa: S301 - written by the owner
    except Exception as error:  # noqa: BLE001 - told to the owner in the place of each result
        failure = (
            f"a data worker could not be set up ({type(error).__name__}: {error}); dataloader_num_workers 0 needs none"
        )

        def materialise(job: MicroBatchJob) -> MicroBatch:
            raise DataError(failure)

    return materialise


def _make(materialise: Materialise, job: MicroBatchJob) -> Any:
    try:
        return pack(materialise(job))
    except VlmDistError as error:
        return error
    except Exception as error:  # noqa: BLE001 - raised in the owner
        # as text: the exception itself may not be picklable
        text = "".join(traceback.format_exception(error))
        print(text, file=sys.stderr, flush=True)  # noqa: T201 - a worker has no logger
        return RuntimeError(f"in a data worker: {type(error).__name__}: {error}\n{text}")


def pack(batch: MicroBatch) -> Any:
    """Turn a micro-batch into something whose arrays pickle can leave out."""
    arrays = {name: _to_array(value) if isinstance(value, Tensor) else value for name, value in batch.inputs.items()}
    return arrays, _to_array(batch.labels), replace(batch, inputs={}, labels=torch.empty(0))


def unpack(content: Any) -> MicroBatch:
    """Undo `pack`, bit for bit; raise the error that came in the place of a micro-batch."""
    if isinstance(content, Exception):
        raise content
    arrays, labels, batch = content
    inputs = {name: _to_tensor(value) if isinstance(value, tuple) else value for name, value in arrays.items()}
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
