"""A loader's process: imports the loader once, then forks a process of its own for every measurement.

    python -m tests.bench.data.runner LOADER

Says how long its imports took, then answers each line of JSON on its standard input with one on its standard output.
Forking after the imports keeps them out of the measurements, and out of the bench's time.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.bench.data.task import BATCH_SIZE, GLOBAL_BATCH_SIZE, Task

_WARM_SAMPLES = 32
_WARM_BATCHES = 3
#: Batches that loaders with workers make ahead of the first that is asked for: not counted.
_AHEAD_BATCHES = 3 * GLOBAL_BATCH_SIZE // BATCH_SIZE
_MEMORY_EVERY = 500  # samples


def main() -> None:
    """Answer requests until the standard input ends."""
    started = float(os.environ["BENCH_STARTED"])
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a loader prints is no answer
    module = importlib.import_module(f"tests.bench.data.loaders.{sys.argv[1]}")
    ready = {"import_seconds": time.time() - started, "settings": module.SETTINGS, "resume": module.RESUME}
    answers.write(json.dumps(ready) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            _end_with_parent()
            _answer(module, request, answers)
        os.waitpid(pid, 0)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # workers that it has left


def _end_with_parent() -> None:
    """Be killed when the parent dies, however that comes about: nothing of a bench that was stopped stays behind."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _answer(module: Any, request: dict[str, Any], answers: Any) -> None:
    try:
        task = Task(**request["task"])
        if request.get("one_core"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        gc.collect()
        result = _DOES[request["do"]](module, task)
    except BaseException as error:  # noqa: BLE001 - told to the bench
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    answers.write(json.dumps(result) + "\n")
    answers.flush()
    sys.stderr.flush()
    os._exit(0)


def _prepare(module: Any, task: Task) -> dict[str, Any]:
    module.prepare(task)
    return {}


def _save_state(module: Any, task: Task) -> dict[str, Any]:
    if hasattr(module, "save_state"):
        module.save_state(task)
    return {}


def _raw(module: Any, task: Task) -> dict[str, Any]:
    """Whole epochs until the time is over, from memory, not from a disk.

    The first epoch is not counted: a young process gets its memory from the system page by page, indexes are opened,
    and shuffle buffers are filled.
    """
    _warm(task.folder / module.FORM)
    sizes = module.raw(task)
    for _ in itertools.islice(sizes, task.num_samples):
        pass
    num_samples = num_bytes = 0
    started, cpu = time.perf_counter(), time.process_time()
    while (seconds := time.perf_counter() - started) < task.seconds:
        num_bytes += sum(itertools.islice(sizes, task.num_samples))
        num_samples += task.num_samples
    return {
        "rate": num_samples / seconds,
        "cpu_seconds": (time.process_time() - cpu) / num_samples,
        "bytes": num_bytes / num_samples,
    }


def _warm(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 22):
                    pass


def _decode(module: Any, task: Task) -> dict[str, Any]:
    _warm(task.folder / module.FORM)
    pictures = module.decoded(task)
    for _ in range(_WARM_SAMPLES):
        next(pictures)
    return _rate(pictures, task.seconds, 1)


def _train(module: Any, task: Task) -> dict[str, Any]:
    _warm(task.folder / module.FORM)
    batches = module.batches(task)
    for _ in range(_AHEAD_BATCHES if task.num_workers else _WARM_BATCHES):
        next(batches)
    # ours comes in whole steps
    return _rate(batches, task.seconds, BATCH_SIZE, GLOBAL_BATCH_SIZE if task.num_workers else BATCH_SIZE)


def _rate(items: Any, seconds: float, samples_each: int, unit: int = 1) -> dict[str, Any]:
    """Take items until the time is over and their samples are a multiple of `unit`."""
    count = 0
    elapsed = 0.0
    started, cpu = time.perf_counter(), time.process_time()
    while elapsed < seconds or count % unit:
        next(items)
        count += samples_each
        elapsed = time.perf_counter() - started
    return {"rate": count / elapsed, "cpu_seconds": (time.process_time() - cpu) / count}


def _first(module: Any, task: Task) -> dict[str, Any]:
    """From the end of the imports to the first batch; with `start`, to the first batch behind it."""
    started = time.perf_counter()
    next(iter(module.batches(task)))
    return {"seconds": time.perf_counter() - started}


def _memory(module: Any, task: Task) -> dict[str, Any]:
    """Resident memory of the process and all below it, as samples go by."""
    import psutil

    process = psutil.Process()
    points = []
    num_samples = 0
    for _ in module.batches(task):
        num_samples += BATCH_SIZE
        if num_samples % _MEMORY_EVERY < BATCH_SIZE:
            resident = once = 0
            for one in [process, *process.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    memory = one.memory_full_info()
                    resident += memory.rss
                    once += memory.pss
            points.append((num_samples, resident / 2**20, once / 2**20))
        if num_samples >= task.limit:
            break
    return {"points": points}


_DOES: dict[str, Callable[[Any, Task], dict[str, Any]]] = {
    "prepare": _prepare,
    "save_state": _save_state,
    "raw": _raw,
    "decode": _decode,
    "train": _train,
    "first": _first,
    "memory": _memory,
}

if __name__ == "__main__":
    main()
