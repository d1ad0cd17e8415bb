"""Saving while training goes on: all ranks collect, the writers' threads write, and what fails is known to all.

The loop stands still only while the state is collected, and where the save before is still being written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from vlm_dist.checkpoint.adapter import AdapterForm
from vlm_dist.checkpoint.layout import checkpoint_name
from vlm_dist.checkpoint.places import Places
from vlm_dist.checkpoint.store import CheckpointStore, RunFacts
from vlm_dist.checkpoint.writer import CheckpointWriter, WriteFailure
from vlm_dist.distributed.group import Ranks
from vlm_dist.distributed.patience import long_work
from vlm_dist.engine import Engine, SlicedState, TrainableState
from vlm_dist.errors import CheckpointError
from vlm_dist.observability.log import MetricLog


@dataclass(frozen=True)
class Stall:
    """What a save costs the loop, in seconds.

    Attributes:
        wait_seconds: for the checkpoint before to be written.
        collect_seconds: to bring the state to the writers' memory.
    """

    wait_seconds: float
    collect_seconds: float

    def as_record(self) -> dict[str, float]:
        """For metrics.jsonl."""
        return {
            "save_stall_seconds": self.wait_seconds + self.collect_seconds,
            "save_wait_seconds": self.wait_seconds,
            "save_collect_seconds": self.collect_seconds,
        }


class CheckpointSaver:
    """Saves the checkpoints of a run. All ranks call everything alike, but for `has_failed` and `close`.

    Args:
        store: of the run; used by the writers alone.
        engine: between two steps.
        ranks: this process among its peers.
        places: who writes.
        facts: position -> what a resumed run needs besides tensors.
        log: where messages and the stall go.
        resumed_at: position of the checkpoint in `store` that the run goes on from; -1: of none.
        written: is told of every checkpoint that this rank has written, in the writer's thread.
    """

    def __init__(
        self,
        store: CheckpointStore,
        engine: Engine,
        ranks: Ranks,
        places: Places,
        facts: Callable[[int], RunFacts],
        log: MetricLog,
        resumed_at: int = -1,
        written: Callable[[int, Path], None] = lambda position, path: None,
    ) -> None:
        self._store = store
        self._engine = engine
        self._ranks = ranks
        self._places = places
        self._facts = facts
        self._log = log
        self._written = written
        self._writer = CheckpointWriter()
        self._form = AdapterForm.of(engine.module, engine.compute_dtype) if places.is_writer else None
        self._position = resumed_at
        self._evaluation: tuple[int, Mapping[str, Any]] = (-1, {})
        self._lost: set[int] = set()  # writers that have failed on the newest checkpoint

    @property
    def has_failed(self) -> bool:
        """Whether this rank could not write something that the others don't know of yet."""
        return self._writer.has_failed

    def begin(self, position: int) -> None:
        """Collect a checkpoint and have it written. Collective: every rank calls this.

        Args:
            position: steps that are done.

        Raises:
            CheckpointError: on every rank: the checkpoint before this one could not be written.
        """
        started = time.perf_counter()
        self.finish()
        waited = time.perf_counter()
        self._position = position
        self._lost.clear()
        name = checkpoint_name(position)
        write = self._collect(position, name)
        stall = Stall(waited - started, time.perf_counter() - waited)
        if write is not None:
            self._writer.submit(position, write)
            if self._evaluation[0] == position:
                self._mark()
        self._log.message(f"{name} is collected and being written; training stood still for {_told(stall)}")
        self._log.log_save(position, stall.as_record())

    def evaluated(self, position: int, figures: Mapping[str, Any]) -> None:
        """Hear of an evaluation; the checkpoint of the same position, written or to come, is judged by it."""
        self._evaluation = (position, figures)
        if position == self._position:
            self._mark()

    def finish(self) -> None:
        """Wait until everything is on the disk. Collective: every rank calls this.

        Raises:
            CheckpointError: on every rank: it could not be written.
        """
        with long_work(self._ranks, "the checkpoint to be written"):
            self._writer.wait()
        self.settle()

    def settle(self) -> None:
        """Tell all ranks what could not be written. Collective: every rank calls this.

        Raises:
            CheckpointError: on every rank: a checkpoint is on no disk, so that the run must not go on as if it were.
        """
        failures = self._ranks.gather_objects(self._take_failure())
        failed = {rank: failure for rank, failure in enumerate(failures) if failure is not None}
        if not failed:
            return
        self._lost |= {rank for rank, failure in failed.items() if failure.step == self._position}
        if not self._places.are_copies:
            raise CheckpointError(failed[min(failed)].message)
        lines = [f"{self._places.name(rank)}: {failure.message}" for rank, failure in failed.items()]
        if len(self._lost) == len(self._places.writers):
            raise CheckpointError("no node could write the checkpoint\n  " + "\n  ".join(lines))
        for line in lines:
            self._log.message(f"warning: {line}; the run goes on, with the copies of the other nodes")

    def _take_failure(self) -> WriteFailure | None:
        return self._writer.take_failure()

    def close(self) -> None:
        """Wait until this rank's writing has ended; for a rank that leaves, alone or with the others."""
        self._writer.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not KeyboardInterrupt:  # asked twice: what is not written yet is given up
            self.close()

    def _collect(self, position: int, name: str) -> Callable[[], None] | None:
        """Bring the state to memory; gives back what writes it, on the ranks that do. Collective."""
        state = self._engine.save(self._store.output_dir, name, self._places.group)
        if state is None:
            return None
        facts = self._facts(position)

        def write() -> None:
            masters = {name: parameter.master for name, parameter in state.parameters.items()}
            self._publish(position, state, masters, facts)

        return write

    def _publish(
        self,
        position: int,
        state: TrainableState | SlicedState,
        weights: Mapping[str, Tensor],
        facts: RunFacts,
        slices: Mapping[Path, Mapping[str, Any]] | None = None,
    ) -> None:
        """Write a checkpoint, in the writer's thread."""
        assert self._form is not None
        started = time.perf_counter()
        path = self._store.save(position, state, self._form.export(weights), facts, slices)
        num_bytes = sum(file.stat().st_size for file in path.iterdir())
        took = time.perf_counter() - started
        self._log.message(f"checkpoint written: {path} ({num_bytes / 1e6:.1f} MB in {took:.1f} s)")
        self._log.event("checkpoint", position, name=path.name, bytes=num_bytes, write_seconds=round(took, 3))
        self._written(position, path)

    def _mark(self) -> None:
        """Judge the newest checkpoint, behind its own writing."""
        position, figures = self._evaluation
        if self._places.is_writer:
            self._writer.submit(position, lambda: self._store.mark(position, figures))


def _told(stall: Stall) -> str:
    """The stall, for people."""
    total = stall.wait_seconds + stall.collect_seconds
    waited = f" ({stall.wait_seconds:.2f} s of it for the one before)" if stall.wait_seconds > 0.1 else ""
    return f"{total:.2f} s{waited}"
