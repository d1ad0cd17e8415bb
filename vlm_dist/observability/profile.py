"""A trace of some steps: where the time goes, on the host and on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vlm_dist.observability.attempt import attempt

DIRECTORY = "profile"

#: Steps before the traced ones in which the profiler runs already, since its own start is slow.
_WARM_UP_STEPS = 1
_NUM_OPERATORS = 40


class StepProfile:
    """Traces some steps of this start of the run with torch's profiler; called once per step, as a context around it.

    Files in `output_dir/profile`: `steps-<first>-<last>-rank-<rank>.json.gz`, for Perfetto or chrome://tracing, and
    `….txt`, the operators that took most time by themselves.

    Args:
        output_dir: of the run.
        rank: of this process.
        start_step: steps of this start that run before.
        num_steps: that are traced.
        with_memory: also trace what tensors take and give back, and the shapes of what operators get.
        report: where messages go.
        pausing: a context around what takes time, but is no step.
    """

    def __init__(
        self,
        output_dir: Path,
        rank: int,
        *,
        start_step: int,
        num_steps: int,
        with_memory: bool = False,
        report: Callable[[str], None] = lambda text: None,
        pausing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._directory = output_dir / DIRECTORY
        self._rank = rank
        self._start_step = start_step
        self._num_steps = num_steps
        self._with_memory = with_memory
        self._report = report
        self._pausing = pausing
        self._num_seen = 0
        self._positions: list[int] = []
        self._profiler: Any = None
        self._is_over = False

    @contextmanager
    def __call__(self, position: int) -> Iterator[None]:
        """Around a step.

        Args:
            position: of the step, from 1.
        """
        if self._is_over:
            yield
            return
        if self._profiler is None and self._num_seen >= self._start_step - _WARM_UP_STEPS:
            self._is_over = not attempt("starting the profiler", self._start)
        yield
        self._num_seen += 1
        if self._profiler is None:
            return
        if self._num_seen > self._start_step:
            self._positions.append(position)
        if len(self._positions) == self._num_steps:
            self._finish()
        else:
            self._profiler.step()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write what there is where the run has ended before the last of the steps."""
        if self._profiler is not None:
            self._finish()
        elif not self._is_over:
            self._report(
                f"notice: nothing was profiled: the run had {self._num_seen} steps, and train.profile.start_step is "
                f"{self._start_step}"
            )
            self._is_over = True

    def _start(self) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile, schedule

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        warm_up = self._start_step - self._num_seen
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=warm_up, active=self._num_steps, repeat=1),
            profile_memory=self._with_memory,
            record_shapes=self._with_memory,
            acc_events=True,
        )
        self._profiler.start()

    def _finish(self) -> None:
        profiler, self._profiler, self._is_over = self._profiler, None, True
        with self._pausing():
            attempt("writing the profile", lambda: self._write(profiler))

    def _write(self, profiler: Any) -> None:
        profiler.stop()
        if not self._positions:
            self._report("notice: nothing was profiled: the run ended in the step before train.profile.start_step")
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        stem = f"steps-{self._positions[0]}-{self._positions[-1]}-rank-{self._rank}"
        trace, table = self._directory / f"{stem}.json.gz", self._directory / f"{stem}.txt"
        profiler.export_chrome_trace(str(trace))
        table.write_text(self._tables(profiler), encoding="utf-8")
        self._report(f"profile: {trace} (open it at ui.perfetto.dev or chrome://tracing); operators: {table}")

    def _tables(self, profiler: Any) -> str:
        import torch

        averages = profiler.key_averages()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        orders = [(f"self_{device}_time_total", "time on the device" if device == "cuda" else "time")]
        if device == "cuda":
            orders.append(("self_cpu_time_total", "time on the host"))
        if self._with_memory:
            orders.append((f"self_{device}_memory_usage", "memory"))
        first, last = self._positions[0], self._positions[-1]
        tables = [
            f"Steps {first} to {last}, rank {self._rank}: operators by their own {what}\n\n"
            + averages.table(sort_by=key, row_limit=_NUM_OPERATORS, max_name_column_width=80)
            for key, what in orders
        ]
        return "\n\n".join(tables) + "\n"
