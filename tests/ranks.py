"""Run a function on several forked gloo ranks and give back what each returned."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_dist.distributed.environment import Topology
from vlm_dist.distributed.group import Ranks, free_port, init_process_groups, shut_down


def _main(function: Callable[..., Any], rank: int, world_size: int, port: int, args: tuple, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    # What the tests before have left is no garbage of this rank's. Without this, each of DeepSpeed's many collections
    # goes through all of it and copies its pages: a third of the time, and most of it after a thousand tests.
    gc.freeze()
    import torch

    torch.set_num_threads(1)
    try:
        ranks = init_process_groups(
            Topology(
                rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size, launcher="torchrun"
            )
        )
        results.put((rank, function(ranks, *args), None))
        ranks.barrier()
        shut_down()
    except BaseException:  # noqa: BLE001 - whatever it was, the parent must hear of it
        results.put((rank, None, traceback.format_exc()))


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 60) -> list[Any]:
    """Call `function(ranks, *args)` on every rank; fails when one fails or the time is over."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_main, args=(function, rank, world_size, port, args, results), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    values: dict[int, Any] = {}
    try:
        for _ in range(world_size):
            rank, value, error = results.get(timeout=timeout_seconds)
            assert error is None, f"rank {rank}:\n{error}"
            values[rank] = value
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
    return [values[rank] for rank in range(world_size)]


def run_doomed_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 60) -> None:
    """As `run_ranks`, for ranks that end by themselves or are ended, and give back nothing."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_main, args=(function, rank, world_size, port, args, results), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout_seconds
    waiting = {process.pid: process for process in processes}
    while waiting and time.monotonic() < deadline:
        for pid in [pid for pid, process in waiting.items() if not process.is_alive()]:
            del waiting[pid]
        if all(_is_stopped(pid) for pid in waiting):
            break
        time.sleep(0.05)
    for process in waiting.values():
        process.kill()


def _is_stopped(pid: int | None) -> bool:
    """Whether SIGSTOP holds the process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


__all__ = ["Ranks", "run_doomed_ranks", "run_ranks"]
