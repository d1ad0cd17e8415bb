"""Work that takes longer than a collective waits, on some ranks of several."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from tests.ranks import Ranks, run_ranks
from vlm_dist.build import data
from vlm_dist.distributed import patience
from vlm_dist.distributed.patience import long_work
from vlm_dist.distributed.signals import AskedToStop
from vlm_dist.errors import DataError, DistributedError

DEADLINE = timedelta(seconds=2)  # of every collective, in the place of minutes


@pytest.fixture(autouse=True)
def _short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "MEETING_SECONDS", 0.2)
    monkeypatch.setattr(patience, "LINE_SECONDS", 1.0)


def impatient(ranks: Ranks) -> Ranks:
    """The same ranks, whose collectives have the short deadline."""
    control: Any = dist.new_group(backend="gloo", timeout=DEADLINE)
    return dataclasses.replace(ranks, control=control)


def index_for_long(ranks: Ranks) -> tuple[float, list[str], list[int]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vlm_dist").addHandler(handler)
    logging.getLogger("vlm_dist").setLevel(logging.INFO)
    ranks = impatient(ranks)
    started = time.monotonic()
    with long_work(ranks, "opening data.train") as work:
        if ranks.rank == 1:
            work.doing = "opening data.train[0] (captions)"
            time.sleep(2.5 * DEADLINE.total_seconds())
    seconds = time.monotonic() - started
    return seconds, lines, ranks.gather_objects(ranks.rank)  # the group is as good as before


def test_others_wait_beyond_the_deadline_of_a_collective_and_one_tells_for_whom() -> None:
    for rank, (seconds, lines, gathered) in enumerate(run_ranks(index_for_long, 3)):
        assert 4.9 <= seconds < 20
        assert gathered == [0, 1, 2]
        assert 2 <= len(lines) <= 5 if rank == 0 else lines == []
        assert all(
            re.match(r"waiting for rank 1 \(opening data.train\[0\] \(captions\)\), 0 min so far", x) for x in lines
        )


def open_sources_slowly(ranks: Ranks) -> tuple[list[str], float]:
    started = time.monotonic()
    opened: Any = data.open_sources(SimpleNamespace(), "train", impatient(ranks))  # type: ignore[arg-type]
    return opened, time.monotonic() - started


def test_sources_that_take_long_to_open_at_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_alone(config: Any, which: str, work: Any) -> list[str]:
        time.sleep(2 * DEADLINE.total_seconds() if int(os.environ["RANK"]) == 0 else 0)
        return [f"source of {work.doing}"]

    monkeypatch.setattr(data, "open_sources_alone", open_alone)
    for opened, seconds in run_ranks(open_sources_slowly, 2):
        assert opened == ["source of opening data.train"]
        assert seconds >= 4


def fail_while_others_work(ranks: Ranks) -> tuple[str, float]:
    ranks = impatient(ranks)
    started = time.monotonic()
    message = ""
    try:
        with long_work(ranks, "opening data.train"):
            if ranks.rank == 0:
                time.sleep(0.5)
                raise DataError("captions: the disk is full")
            if ranks.rank == 1:  # another node's first: in a wait that only the system can end
                subprocess.run(["sleep", "60"], check=True)
    except DataError as error:
        message = str(error)
    return message, time.monotonic() - started


def test_a_failure_ends_the_work_of_all_at_once() -> None:
    results = run_ranks(fail_while_others_work, 3)
    assert [message for message, _ in results] == [
        "captions: the disk is full",
        *["rank 0: captions: the disk is full"] * 2,
    ]
    assert all(seconds < 10 for _, seconds in results)


def stop_while_others_work(ranks: Ranks) -> tuple[str, float]:
    ranks = impatient(ranks)
    started = time.monotonic()
    try:
        with long_work(ranks, "opening data.train", leaves_if_asked=True):
            if ranks.rank == 0:
                ranks.stop.ask("a test")
            time.sleep(30)
    except AskedToStop as asked:
        return str(asked), time.monotonic() - started
    return "", 0.0


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_request_to_stop_ends_the_work_of_all_at_once(world_size: int) -> None:
    for message, seconds in run_ranks(stop_while_others_work, world_size):
        assert message == ("SIGTERM" if world_size == 1 else "SIGTERM to rank 0")
        assert seconds < 10


def lose_the_worker(ranks: Ranks, number: int, results: Any) -> None:
    ranks = impatient(ranks)
    started = time.monotonic()
    try:
        with long_work(ranks, "opening data.train"):
            if ranks.rank == 1:
                time.sleep(0.5)
                os.kill(os.getpid(), number)
                time.sleep(60)
    except DistributedError as error:
        results.put((ranks.rank, str(error), time.monotonic() - started))
    os._exit(0)  # what a rank does that has told its error


@pytest.mark.parametrize(("number", "limit"), [(signal.SIGKILL, 4.0), (signal.SIGSTOP, 8.0)])
def test_a_rank_that_is_dead_or_frozen_is_not_waited_for(number: int, limit: float) -> None:
    results = multiprocessing.get_context("fork").SimpleQueue()
    with contextlib.suppress(Exception):  # the ranks return nothing
        run_ranks(lose_the_worker, 3, number, results, timeout_seconds=limit + 1)
    told = []
    while not results.empty():
        told.append(results.get())
    assert {rank for rank, _, _ in told} == {0, 2}
    for _, message, seconds in told:
        assert re.search(r"waiting for .*opening data.train\): a rank is gone or does not answer", message)
        assert seconds < limit
