"""The writer's thread: one job after the other, and what fails is kept until somebody takes it."""

from __future__ import annotations

import threading
import time

from vlm_dist.checkpoint.writer import CheckpointWriter, WriteFailure
from vlm_dist.errors import CheckpointError


def test_jobs_are_done_in_order_by_a_thread_while_the_caller_goes_on() -> None:
    writer, may_go, done = CheckpointWriter(), threading.Event(), []
    threads = set()

    def job(number: int) -> None:
        may_go.wait(10)
        threads.add(threading.current_thread())
        done.append(number)

    for number in range(3):
        writer.submit(number, lambda number=number: job(number))  # type: ignore[misc]
    assert done == []
    may_go.set()
    writer.wait()
    assert done == [0, 1, 2]
    assert len(threads) == 1
    assert threading.current_thread() not in threads
    assert not writer.has_failed


def test_a_failure_waits_to_be_taken_and_the_next_job_is_done() -> None:
    writer, done = CheckpointWriter(), []

    def fail() -> None:
        raise CheckpointError("disk full")

    writer.submit(4, fail)
    writer.submit(5, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    writer.submit(6, lambda: done.append(6))
    writer.wait()
    assert done == [6]
    assert writer.has_failed
    assert writer.take_failure() == WriteFailure(4, "disk full")  # the first
    assert not writer.has_failed
    writer.submit(7, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    writer.wait()
    failure = writer.take_failure()
    assert failure is not None
    assert "ZeroDivisionError" in failure.message


def test_waiting_for_nothing_takes_no_time() -> None:
    started = time.monotonic()
    CheckpointWriter().wait()
    assert time.monotonic() - started < 1
