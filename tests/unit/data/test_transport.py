"""Results of workers arrive whole and writable, and their memory is used again when nobody looks at it any more."""

import gc
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import reduction
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm_dist.data.workers.transport import Receiver, Sender

LARGE = 1_000_003  # values: an odd size, beyond what goes through the pipe


class Line:
    """Both ends of a worker's pipe, in one process."""

    def __init__(self):
        ours, theirs = multiprocessing.Pipe()
        self.sender, self.receiver = Sender(theirs), Receiver(ours)

    def __call__(self, content):
        with ThreadPoolExecutor(1) as pool:
            arrived = pool.submit(self.receiver.receive)
            self.sender.release(self.receiver.take_released())
            self.sender.send(content)
            return arrived.result(timeout=30).open()

    @property
    def pieces(self):
        return len(self.sender._pieces)


@pytest.mark.parametrize("num_values", [0, 3, LARGE])
def test_arrays_arrive_equal_and_writable(num_values):
    content = {
        "floats": np.arange(num_values, dtype=np.float32),
        "bytes": np.arange(num_values).astype(np.uint8),
        "scalar": np.array(7),
        "text": "é",
    }
    again = Line()(content)
    assert again["text"] == "é"
    for name in ("floats", "bytes", "scalar"):
        assert np.array_equal(again[name], content[name])
        assert again[name].flags.writeable
        again[name][...] = 1
    assert content["scalar"] == 7


def test_memory_is_used_again_but_never_under_a_living_tensor():
    line = Line()
    kept = torch.from_numpy(line(np.full(LARGE, 1.0)))[5:]  # a view of a tensor of an array
    for number in range(4):
        assert line(np.full(LARGE, 2.0 + number))[0] == 2.0 + number
        gc.collect()
    assert line.pieces == 2
    assert (kept == 1.0).all()
    del kept
    gc.collect()
    line(np.zeros(LARGE))
    assert line.pieces == 2


def test_tensors_outlive_their_worker():
    line = Line()
    kept = line(np.full(LARGE, 3.0))
    del line
    gc.collect()
    assert (kept == 3.0).all()


def test_memory_that_is_idle_for_long_is_given_back():
    line = Line()
    before = len(list(Path("/proc/self/fd").iterdir()))
    first = [line(np.zeros(30_000)) for _ in range(5)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 5  # the worker's; its owner keeps none
    del first
    for _ in range(70):
        line(np.zeros(30_000))
    assert line.pieces == 1
    assert len(line.receiver._pieces) == 1
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1


def test_without_anonymous_files_the_pipe_carries_everything(monkeypatch):
    def refuse(*_):
        raise OSError(38, "not here")

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert Line()(np.arange(1_000_000)).sum() == 499_999_500_000


def test_a_worker_that_dies_before_it_hands_over_the_memory_is_noticed(monkeypatch):
    def die(pipe, *_):
        pipe.close()
        raise OSError("killed")

    line = Line()
    monkeypatch.setattr(reduction, "send_handle", die)
    with pytest.raises(OSError, match="killed"):
        line.sender.send(np.zeros(LARGE))
    with pytest.raises((EOFError, OSError)):
        line.receiver.receive()
