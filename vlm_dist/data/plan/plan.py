"""The plan: which samples every optimizer step sees, and in which micro-batches; a pure function of its inputs.

Every rank computes the same plan without communicating. A step is named by its number alone: any step of the run can
be planned at once, on any number of ranks, without replaying those before it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.lengths import FactLengths, LengthModel
from vlm_dist.data.plan.order import (
    ORDER_VERSION,
    EpochOrder,
    Samples,
    SourceShape,
    cut_into_steps,
    num_groups,
    num_windows,
)
from vlm_dist.data.types import SampleRef, Source, StepPlan
from vlm_dist.errors import CheckpointError, DataError

_KEPT_WINDOWS = 2  # the one being trained on, and the one that prefetching has reached
_MAX_STATE_BYTES = 1000
_ROUNDING = 1e-9  # 0.29 x 100 is 28.999999999999996


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """How samples become steps.

    Attributes:
        global_batch_size: samples per optimizer step, over all ranks.
        micro_batch_size: samples per forward pass.
        mode: "padding" shuffles a step's samples; "group_by_length" puts neighbours in length into one micro-batch.
        seed: of the order.
        num_epochs: may be a fraction.
        max_steps: wins over `num_epochs` when it is positive.
        shuffle: False keeps the order of the data (evaluation).
    """

    global_batch_size: int
    micro_batch_size: int
    mode: Literal["padding", "group_by_length"] = "padding"
    seed: int = 42
    num_epochs: float = 1.0
    max_steps: int | None = None
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.global_batch_size < 1 or self.micro_batch_size < 1:
            raise DataError(
                f"batch sizes must be positive: global {self.global_batch_size}, micro {self.micro_batch_size}"
            )
        if self.mode not in ("padding", "group_by_length"):
            raise DataError(f"plan mode {self.mode!r} is unknown; expected padding or group_by_length")
        if not (self.max_steps and self.max_steps > 0) and not self.num_epochs > 0:
            raise DataError(f"num_epochs must be above 0, got {self.num_epochs}")


class Plan:
    """All steps of a run.

    Args:
        sources: the data.
        repeats: passes over each source in an epoch, as floats; an epoch has the sum of floor(repeat x samples).
        settings: how samples become steps.
        lengths: predicts costs; None: estimates from facts alone.

    Raises:
        DataError: if an epoch would have no samples.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        repeats: Sequence[float],
        settings: PlanSettings,
        lengths: LengthModel | None = None,
    ) -> None:
        if len(sources) != len(repeats):
            raise DataError(f"{len(sources)} sources but {len(repeats)} repeats")
        self._sources = tuple(sources)
        self._lengths: LengthModel = lengths if lengths is not None else FactLengths(sources)
        self.settings = settings
        self._repeats = tuple(float(repeat) for repeat in repeats)
        self._shapes = tuple(
            SourceShape(tuple(source.shard_sizes), _num_epoch_samples(source, repeat))
            for source, repeat in zip(sources, self._repeats, strict=True)
        )
        self.num_epoch_samples = sum(shape.num_epoch_samples for shape in self._shapes)
        if self.num_epoch_samples == 0:
            listed = ", ".join(
                f"{source.name}: {len(source)} samples x repeat {repeat:g}"
                for source, repeat in zip(sources, self._repeats, strict=True)
            )
            raise DataError(
                f"an epoch has no samples ({listed or 'no sources'}); check data.train, repeat and max_samples"
            )
        self._num_windows = num_windows(self.steps_per_epoch, settings.global_batch_size)
        self._windows: dict[tuple[int, int], list[Samples]] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch; the last may have empty slots."""
        return -(-self.num_epoch_samples // self.settings.global_batch_size)

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        if self.settings.max_steps and self.settings.max_steps > 0:
            return self.settings.max_steps
        return max(1, math.ceil(self.settings.num_epochs * self.steps_per_epoch - _ROUNDING))

    @property
    def digest(self) -> str:
        """Hex digest of all that the samples of a step depend on; the number of ranks is not part of it."""
        return hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()[:32]

    def step(self, index: int) -> StepPlan:
        """Plan one step; costs its window, whose steps are then kept.

        Raises:
            IndexError: if the run has no such step.
        """
        if not 0 <= index < self.num_steps:
            raise IndexError(f"step {index} of {self.num_steps}")
        epoch, step_in_epoch = divmod(index, self.steps_per_epoch)
        window = self._window_of(step_in_epoch)
        samples = self._steps_of(epoch, window)[step_in_epoch - self._first_step(window)]
        slots: list[SampleRef | None] = [
            SampleRef(source, row, repeat)
            for source, row, repeat in zip(
                samples.source.tolist(), samples.row.tolist(), samples.repeat.tolist(), strict=True
            )
        ]
        slots += [None] * (self.settings.global_batch_size - len(slots))
        size = self.settings.micro_batch_size
        return StepPlan(
            step=index,
            epoch=epoch + (step_in_epoch + 1) / self.steps_per_epoch,
            micro_batches=tuple(tuple(slots[i : i + size]) for i in range(0, len(slots), size)),
        )

    def steps(self, start: int = 0) -> Iterator[StepPlan]:
        """Iterate over the steps from `start` to the end of the run."""
        for index in range(start, self.num_steps):
            yield self.step(index)

    def state(self, step: int) -> dict[str, Any]:
        """Describe the position after `step` steps and what must be the same to go on: below 1 KB of JSON."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        state = {
            "step": step,
            "epoch": epoch,
            "step_in_epoch": step_in_epoch,
            "digest": self.digest,
            **self._identity(),
        }
        if len(json.dumps(state).encode()) > _MAX_STATE_BYTES:
            state["sources"] = _hash_json(state["sources"])
        return state

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Check that a saved position belongs to this plan.

        Raises:
            CheckpointError: naming everything that has changed.
        """
        if state.get("digest") == self.digest:
            return
        own = self._identity()
        if not isinstance(state.get("sources"), list):
            own["sources"] = _hash_json(own["sources"])
        changes = [
            f"  {name}: checkpoint {_shown(state.get(name))}, now {_shown(value)}"
            for name, value in own.items()
            if name != "sources" and state.get(name) != value
        ]
        changes += _source_changes(state.get("sources"), own["sources"])
        raise CheckpointError(
            "the checkpoint's data order is not this run's; it cannot be continued exactly:\n"
            + "\n".join(changes or [f"  digest: checkpoint {state.get('digest')}, now {self.digest}"])
            + "\nrestore the values of the checkpoint, or start a new run"
        )

    def _identity(self) -> dict[str, Any]:
        """All that decides which samples a step has. How long the run is does not, nor how a step is cut."""
        return {
            "order_version": ORDER_VERSION,
            "global_batch_size": self.settings.global_batch_size,
            "mode": self.settings.mode,
            "seed": self.settings.seed,
            "shuffle": self.settings.shuffle,
            "lengths": self._lengths.digest,
            "sources": [
                [source.name, len(source), repeat, hashlib.sha256(source.manifest_hash.encode()).hexdigest()[:16]]
                for source, repeat in zip(self._sources, self._repeats, strict=True)
            ],
        }

    def _window_of(self, step_in_epoch: int) -> int:
        """Return the window that a step lies in; windows differ by at most one step in length."""
        return ((step_in_epoch + 1) * self._num_windows - 1) // self.steps_per_epoch

    def _first_step(self, window: int) -> int:
        return window * self.steps_per_epoch // self._num_windows

    def _steps_of(self, epoch: int, window: int) -> list[Samples]:
        steps = self._windows.get((epoch, window))
        if steps is None:
            steps = self._plan_window(epoch, window)
            kept = [*self._windows.items(), ((epoch, window), steps)][-_KEPT_WINDOWS:]
            self._windows = dict(kept)  # replaced as a whole: a prefetching thread may plan at the same time
        return steps

    def _plan_window(self, epoch: int, window: int) -> list[Samples]:
        settings = self.settings
        groups = num_groups(settings.global_batch_size)
        order = EpochOrder(self._shapes, settings.seed, epoch, groups, settings.shuffle)
        size = settings.global_batch_size
        start = self._first_step(window) * size
        stop = min(self._first_step(window + 1) * size, self.num_epoch_samples)
        samples = order.window(start, stop)
        by_length = settings.mode == "group_by_length"
        if settings.shuffle:
            lengths = self._predict_lengths if by_length else None
            return cut_into_steps(samples, size, (settings.seed, epoch, window), lengths)
        steps = [samples.take(np.arange(i, min(i + size, len(samples)))) for i in range(0, len(samples), size)]
        if by_length:
            steps = [step.take(np.argsort(-self._predict_lengths(step), kind="stable")) for step in steps]
        return steps

    def _predict_lengths(self, samples: Samples) -> NDArray[np.int64]:
        lengths = np.zeros(len(samples), dtype=np.int64)
        for number in range(len(self._sources)):
            chosen = samples.source == number
            if chosen.any():
                lengths[chosen] = self._lengths.costs(number, samples.row[chosen]).tokens
        return lengths


def _num_epoch_samples(source: Source, repeat: float) -> int:
    if not (math.isfinite(repeat) and repeat > 0):
        raise DataError(f"{source.name}: repeat must be above 0, got {repeat}")
    return math.floor(repeat * len(source) + _ROUNDING)


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)


def _source_changes(before: Any, now: Any) -> list[str]:
    """List how the sources differ, one line each."""
    if not isinstance(before, list):
        return [] if before == now else ["  sources: their names, sizes, repeats or contents have changed"]
    changes = []
    for i in range(max(len(before), len(now))):
        old, new = (rows[i] if i < len(rows) else None for rows in (before, now))
        if old == new:
            continue
        if old is None or new is None:
            changes.append(f"  source {i}: checkpoint {old and old[0]}, now {new and new[0]}")
            continue
        parts = [
            f"{what} {_shown(a)} -> {_shown(b)}"
            for what, a, b in zip(("name", "samples", "repeat", "contents"), old, new, strict=False)
            if a != b
        ]
        changes.append(f"  source {i} ({new[0]}): {', '.join(parts)}")
    return changes
