"""Verifies shards in processes that may die: a decoder that crashes or hangs costs one finding, not the run."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from vlm_dist.data.shards.verify import AtMember, Finding, ShardRead, verify_shard
from vlm_dist.errors import DataError

_DECODE_SECONDS = 120.0  # for one member
_MAX_FAILURES = 100  # of one shard; each starts a process


@dataclass(frozen=True, slots=True)
class _Task:
    path: Path
    start_row: int = 0
    num_failures: int = 0


@dataclass(frozen=True, slots=True)
class _Failure:
    problem: str
    message: str


@dataclass(eq=False, slots=True)
class _Worker:
    process: SpawnProcess
    pipe: connection.Connection
    task: _Task
    at: AtMember | None = None
    deadline: float = float("inf")  # monotonic seconds


def verify_shards(
    paths: Sequence[Path],
    index_dir: Path | None = None,
    *,
    workers: int = 1,
    decode: bool = False,
    on_finding: Callable[[Finding], None],
    on_shard: Callable[[ShardRead], None],
) -> None:
    """Verify shards in parallel processes.

    Args:
        paths: the tars.
        index_dir: where indexes lie that are not beside their tar.
        workers: processes.
        decode: also decode all images and videos.
        on_finding: is called with everything that is wrong, as it is found.
        on_shard: is called when a shard is done.

    Raises:
        DataError: a process dies where nothing is decoded (out of memory, say).
    """
    waiting = deque(_Task(path) for path in paths)
    running: list[_Worker] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(_start(waiting.popleft(), index_dir, decode))
            ready = connection.wait([worker.pipe for worker in running], _seconds_left(running))
            for worker in list(running):
                if worker.pipe in ready:
                    event = _receive(worker)
                elif time.monotonic() > worker.deadline:
                    event = _Failure("timeout", f"decoding takes more than {_DECODE_SECONDS:.0f} s")
                else:
                    continue
                if isinstance(event, Finding):
                    on_finding(event)
                elif isinstance(event, AtMember):
                    worker.at, worker.deadline = event, time.monotonic() + _DECODE_SECONDS
                elif isinstance(event, ShardRead):
                    on_shard(event)
                    if waiting:
                        _give(worker, waiting.popleft())
                    else:
                        running.remove(worker)
                        _end(worker)
                else:
                    running.remove(worker)
                    _end(worker)
                    task = _after_failure(worker, event, on_finding)
                    if task is not None:
                        waiting.appendleft(task)
                    else:
                        on_shard(ShardRead(0, 0, has_index=False, has_checksums=False))
    finally:
        for worker in running:
            _end(worker)


def _start(task: _Task, index_dir: Path | None, decode: bool) -> _Worker:
    # spawned: decoders do not survive a fork of a process that has used them
    context = multiprocessing.get_context("spawn")
    own, other = context.Pipe()
    process = context.Process(target=_work, args=(other, index_dir, decode))
    process.start()
    other.close()
    worker = _Worker(process, own, task)
    _give(worker, task)
    return worker


def _give(worker: _Worker, task: _Task) -> None:
    worker.task, worker.at, worker.deadline = task, None, float("inf")
    with suppress(BrokenPipeError):  # it has died; the next receive tells
        worker.pipe.send((task.path, task.start_row))


def _receive(worker: _Worker) -> object:
    try:
        event = worker.pipe.recv()
    except (EOFError, ConnectionError):
        return _Failure("crash", "the decoder ended the process")
    if isinstance(event, DataError):
        raise event
    return event


def _seconds_left(running: Sequence[_Worker]) -> float | None:
    nearest = min(worker.deadline for worker in running)
    return None if nearest == float("inf") else max(0.0, nearest - time.monotonic())


def _after_failure(worker: _Worker, failure: object, on_finding: Callable[[Finding], None]) -> _Task | None:
    """Report the member that a process failed at.

    Returns:
        What is left of its shard; None: it is given up.
    """
    assert isinstance(failure, _Failure), failure
    at, task = worker.at, worker.task
    if at is None:
        raise DataError(f"{task.path}: the process that read this shard has died (out of memory?); try --workers 1")
    on_finding(Finding(str(task.path), failure.problem, failure.message, at.key, at.member))
    if task.num_failures + 1 < _MAX_FAILURES:
        return _Task(task.path, at.row + 1, task.num_failures + 1)
    on_finding(Finding(str(task.path), failure.problem, f"{_MAX_FAILURES} members failed so; the rest is not decoded"))
    return None


def _end(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.kill()
    worker.process.join()


def _work(pipe: connection.Connection, index_dir: Path | None, decode: bool) -> None:
    while True:
        try:
            path, start_row = pipe.recv()
        except EOFError:
            return
        try:
            for event in verify_shard(path, index_dir, decode, start_row):
                pipe.send(event)
        except DataError as error:  # not of a sample: a decoder that is not installed, say
            pipe.send(error)
        except BrokenPipeError:
            return
