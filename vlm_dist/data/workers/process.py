"""What runs in a data worker, and how micro-batches come back from it.

A micro-batch travels as plain bytes through a pipe that only this worker writes to. Torch's own way of sending tensors
would keep file descriptors open in both processes and lose tensors when a worker dies; a pipe that workers share would
be blocked for good by one that dies in the middle of a message.
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
import torch
from torch import Tensor

from vlm_dist.data.types import MicroBatch, MicroBatchJob
from vlm_dist.errors import DataError, VlmDistError

Materialise = Callable[[MicroBatchJob], MicroBatch]

#: What a worker sends first.
READY = b""

_PROTOCOL = 5


def run_worker(pipe: connection.Connection, payload: bytes) -> None:
    """Make the micro-batches that are asked for until the pipe is closed.

    Args:
        pipe: takes READY, then gives jobs and takes packed results.
        payload: the pickled materialiser.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's business
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_owner, name="owner-watch", daemon=True).start()
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    materialise = _set_up(payload)
    pipe.send_bytes(READY)
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send_bytes(_make(materialise, job))


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


def _make(materialise: Materialise, job: MicroBatchJob) -> bytes:
    try:
        return pack(materialise(job))
    except VlmDistError as error:
        return pickle.dumps(error, _PROTOCOL)
    except Exception as error:  # noqa: BLE001 - raised in the owner
        # as text: the exception itself may not be picklable
        text = "".join(traceback.format_exception(error))
        print(text, file=sys.stderr, flush=True)  # noqa: T201 - a worker has no logger
        return pickle.dumps(RuntimeError(f"in a data worker: {type(error).__name__}: {error}\n{text}"), _PROTOCOL)


def pack(batch: MicroBatch) -> bytes:
    """Turn a micro-batch into bytes."""
    arrays = {name: _to_array(tensor) for name, tensor in batch.inputs.items()}
    rest = replace(batch, inputs={}, labels=torch.empty(0))
    return pickle.dumps((arrays, _to_array(batch.labels), rest), _PROTOCOL)


def unpack(data: bytes) -> MicroBatch:
    """Undo `pack`, bit for bit; raise the error that came in the place of a micro-batch."""
    content: Any = pickle.loads(data)  # noqa: S301 - written by our own worker
    if isinstance(content, Exception):
        raise content
    arrays, labels, batch = content
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
