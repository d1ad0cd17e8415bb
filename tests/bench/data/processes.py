"""The loaders' processes, seen from the bench."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from tests.bench.data.environments import ROOT, python_of
from tests.bench.data.task import Task

_START_SECONDS = 400


class MeasureError(Exception):
    """A loader could not be measured."""


class LoaderProcess:
    """A loader that has done its imports and waits for tasks.

    Args:
        name: module in `tests.bench.data.loaders`.
        log: file that takes what it prints.
    """

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self._log = log
        environment = {
            **os.environ,
            "BENCH_STARTED": repr(time.time()),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        with log.open("a") as stderr:
            self._process = subprocess.Popen(
                [str(python_of(name)), "-m", "tests.bench.data.runner", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=ROOT,
                env=environment,
            )
        self._rest = b""
        self.ready = self._read(_START_SECONDS)

    def do(self, what: str, task: Task, *, one_core: bool = False, limit_seconds: float = 120) -> dict[str, Any]:
        """Let it do a task in a process of its own.

        Raises:
            MeasureError: it failed, or took too long.
        """
        request = {"do": what, "task": asdict(task), "one_core": one_core}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._read(limit_seconds)
        with self._log.open("a") as log:
            log.write(json.dumps({"loader": self.name, **request, **answer}) + "\n")
        if "error" in answer:
            raise MeasureError(f"{self.name}: {what}: {answer['error']}; see {self._log}")
        return answer

    def close(self) -> None:
        """End it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self, limit_seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        number = self._process.stdout.fileno()
        deadline = time.monotonic() + limit_seconds
        while b"\n" not in self._rest:
            ready, _, _ = select.select([number], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(number, 1 << 16) if ready else b""
            if not data:
                self._process.kill()
                what = "ended" if ready else f"did not answer within {limit_seconds:.0f} s"
                raise MeasureError(f"{self.name}: {what}; see {self._log}")
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
