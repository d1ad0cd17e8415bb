"""The plan: which samples every optimizer step sees, and in which micro-batches; a pure function of its inputs.

Every rank computes the same plan without communicating. A step is named by its number alone: any step of the run can
be planned at once, on any number of ranks, without replaying those before it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.lengths import Costs, FactLengths, LengthModel
from vlm_dist.data.plan.contents import Contents, changed_files, contents_of
from vlm_dist.data.plan.cut import cut_padded, in_dealing_order, nodes_of, rows_per_node, share_among_nodes
from vlm_dist.data.plan.order import ORDER_VERSION, EpochOrder, Samples, SourceShape
from vlm_dist.data.plan.packing import pack_step
from vlm_dist.data.plan.state import bounded, check_same, digest_of
from vlm_dist.data.plan.windows import num_groups, num_windows, order_window
from vlm_dist.data.types import Layout, PackBudget, SampleRef, Source, StepPlan
from vlm_dist.errors import DataError

Mode = Literal["padding", "group_by_length", "packing"]

_KEPT_WINDOWS = 2  # the one being trained on, and the one that prefetching has reached
_ROUNDING = 1e-9  # 0.29 x 100 is 28.999999999999996


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """How samples become steps, and steps micro-batches.

    Attributes:
        global_batch_size: samples per optimizer step, over all ranks.
        micro_batch_size: samples per forward pass, where they are padded.
        mode: "padding" shuffles a step's samples; "group_by_length" puts neighbours in length into one micro-batch;
            "packing" has the steps of "padding", and cuts them into packs.
        seed: of the order.
        num_epochs: may be a fraction.
        max_steps: wins over `num_epochs` when it is positive.
        shuffle: False keeps the order of the data (evaluation).
        pack: what a pack may hold; needed for "packing".
        balance_scope: "node": a node's ranks get samples of the node's own groups of shards.
    """

    global_batch_size: int
    micro_batch_size: int
    mode: Mode = "padding"
    seed: int = 42
    num_epochs: float = 1.0
    max_steps: int | None = None
    shuffle: bool = True
    pack: PackBudget | None = None
    balance_scope: Literal["world", "node"] = "world"

    def __post_init__(self) -> None:
        if self.global_batch_size < 1 or self.micro_batch_size < 1:
            raise DataError(
                f"batch sizes must be positive: global {self.global_batch_size}, micro {self.micro_batch_size}"
            )
        if self.mode not in ("padding", "group_by_length", "packing"):
            raise DataError(f"plan mode {self.mode!r} is unknown; expected padding, group_by_length or packing")
        if self.mode == "packing" and self.pack is None:
            raise DataError("packing needs a budget: what one pack may hold")
        if not (self.max_steps and self.max_steps > 0) and not self.num_epochs > 0:
            raise DataError(f"num_epochs must be above 0, got {self.num_epochs}")

    @property
    def by_length(self) -> bool:
        """Whether lengths decide which samples share a step."""
        return self.mode == "group_by_length"


@dataclass(frozen=True)
class _Window:
    """The samples of some steps, in order, and their costs where they are needed."""

    samples: Samples
    costs: Costs | None


class Plan:
    """All steps of a run.

    Args:
        sources: the data.
        repeats: passes over each source in an epoch, as floats; an epoch has the sum of floor(repeat x samples).
        settings: how samples become steps.
        lengths: predicts costs; None: estimates from facts alone.
        layout: today's ranks; packs, and micro-batches of a node, are cut for them.

    Raises:
        DataError: if an epoch would have no samples.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        repeats: Sequence[float],
        settings: PlanSettings,
        lengths: LengthModel | None = None,
        layout: Layout = Layout(),  # noqa: B008 - frozen
    ) -> None:
        if len(sources) != len(repeats):
            raise DataError(f"{len(sources)} sources but {len(repeats)} repeats")
        self._sources = tuple(sources)
        self._lengths: LengthModel = lengths if lengths is not None else FactLengths(sources)
        self.settings = settings
        self.layout = layout
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
                f"an epoch has no samples ({listed or 'no sources'}); check data.train, repeat, where and max_samples"
            )
        by_length = settings.by_length and settings.shuffle
        self.num_groups = num_groups(settings.global_batch_size, self.num_epoch_samples if by_length else None)
        self._num_windows = num_windows(
            self.steps_per_epoch, settings.global_batch_size, self.num_groups if by_length else None
        )
        self.notices: tuple[str, ...] = ()
        self._num_nodes = 1
        if settings.balance_scope == "node" and settings.shuffle:
            nodes = nodes_of(layout, self.num_groups)
            if isinstance(nodes, int):
                self._num_nodes = nodes
            else:
                self.notices = (f"balance_scope: node has no effect, as {nodes}; any rank gets any sample of a step",)
        # what mixes all samples needs no costs for a cut into equal counts, nor indexes of shards for its plan
        self._needs_costs = settings.mode != "padding" or not self._lengths.mixes_all
        self._windows: dict[tuple[int, int], _Window] = {}

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
        """Hex digest of all that the samples of a step depend on: neither the ranks nor how a step is cut."""
        return digest_of(self._identity())

    @property
    def cut_digest(self) -> str:
        """Hex digest of all that decides what each rank gets: the same on all ranks of a run, today."""
        cut = self.settings
        pack = None if cut.pack is None else [cut.pack.max_tokens, cut.pack.max_patches, cut.pack.headroom]
        layout = [self.layout.world_size, self._num_nodes]
        lengths = self._lengths.digest if self._needs_costs else None
        return digest_of([self._identity(), cut.mode, cut.micro_batch_size, pack, cut.balance_scope, layout, lengths])

    def step(self, index: int) -> StepPlan:
        """Plan one step; costs its window, which is then kept.

        Raises:
            IndexError: if the run has no such step.
        """
        samples, costs = self._samples_of(index)
        slots = [
            SampleRef(source, row, repeat)
            for source, row, repeat in zip(
                samples.source.tolist(), samples.row.tolist(), samples.repeat.tolist(), strict=True
            )
        ]
        is_packed = self.settings.mode == "packing"
        cut = self._pack(samples, costs) if is_packed else self._cut(samples, costs)
        for_world = self.layout.world_size if is_packed or self._num_nodes > 1 else None
        return StepPlan(
            step=index,
            epoch=index // self.steps_per_epoch + (index % self.steps_per_epoch + 1) / self.steps_per_epoch,
            micro_batches=tuple(tuple(None if slot is None else slots[slot] for slot in batch) for batch in cut),
            pack=self.settings.pack if is_packed else None,
            world_size=for_world,
        )

    def steps(self, start: int = 0) -> Iterator[StepPlan]:
        """Iterate over the steps from `start` to the end of the run."""
        for index in range(start, self.num_steps):
            yield self.step(index)

    def costs(self, refs: Sequence[SampleRef]) -> Costs:
        """Predict the costs of some samples."""
        source = np.array([ref.source for ref in refs], dtype=np.int64)
        return self._predict(source, np.array([ref.index for ref in refs], dtype=np.int64))

    def state(self, step: int) -> dict[str, Any]:
        """Describe the position after `step` steps and what must be the same to go on: below 1 KB of JSON."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return bounded(
            {
                "step": step,
                "epoch": epoch,
                "step_in_epoch": step_in_epoch,
                "digest": self.digest,
                **self._identity(),
                # under packing they decide the cut alone: a run goes on with them, but may go on with others
                "lengths": self._lengths.digest if self.settings.mode != "padding" else None,
            }
        )

    @property
    def contents(self) -> Contents:
        """The files of the sources."""
        return contents_of(self._sources)

    def check_state(self, state: Mapping[str, Any], before: Contents | None = None) -> None:
        """Check that a saved position belongs to this plan.

        Args:
            state: as `state` gave it.
            before: the files that there were then, where that is known.

        Raises:
            CheckpointError: naming everything that has changed.
        """
        check_same(state, self._identity(), lambda: {} if before is None else changed_files(before, self.contents))

    def _identity(self) -> dict[str, Any]:
        """All that decides which samples a step has. How long the run is does not, nor how a step is cut."""
        by_length = self.settings.by_length
        return {
            "order_version": ORDER_VERSION,
            "global_batch_size": self.settings.global_batch_size,
            "order": "grouped by length" if by_length else "shuffled",
            "seed": self.settings.seed,
            "shuffle": self.settings.shuffle,
            "lengths": self._lengths.digest if by_length else None,
            "sources": [
                [source.name, len(source), repeat, hashlib.sha256(source.manifest_hash.encode()).hexdigest()[:16]]
                for source, repeat in zip(self._sources, self._repeats, strict=True)
            ],
        }

    def _cut(self, samples: Samples, costs: Costs | None) -> list[list[int | None]]:
        """Cut a step into padded micro-batches, in the order in which they are dealt to ranks."""
        settings = self.settings
        keys = None if costs is None else costs.batch_key
        if self._num_nodes == 1:
            slots = range(len(samples))
            return cut_padded(slots, keys, settings.micro_batch_size, settings.global_batch_size)
        shares = share_among_nodes(self._node_of(samples), self._num_nodes, settings.global_batch_size)
        slots_per_node = settings.global_batch_size // self._num_nodes
        cut = [cut_padded(share, keys, settings.micro_batch_size, slots_per_node) for share in shares]
        return in_dealing_order(rows_per_node(cut, self.layout.ranks_per_node))

    def _pack(self, samples: Samples, costs: Costs | None) -> list[list[int]]:
        """Cut a step into packs, in the order in which they are dealt to ranks."""
        assert costs is not None
        assert self.settings.pack is not None
        node = self._node_of(samples)
        parts = [np.flatnonzero(node == number) for number in range(self._num_nodes)]
        packs = pack_step(costs, self.settings.pack, parts, self.layout.world_size // self._num_nodes)
        return in_dealing_order(packs)

    def _node_of(self, samples: Samples) -> NDArray[np.int64]:
        """Which node's groups each sample is of: contiguous runs of groups."""
        return samples.group.astype(np.int64) * self._num_nodes // self.num_groups

    def _samples_of(self, index: int) -> tuple[Samples, Costs | None]:
        if not 0 <= index < self.num_steps:
            raise IndexError(f"step {index} of {self.num_steps}")
        epoch, step_in_epoch = divmod(index, self.steps_per_epoch)
        number = self._window_of(step_in_epoch)
        window = self._windows.get((epoch, number))
        if window is None:
            window = self._plan_window(epoch, number)
            kept = [*self._windows.items(), ((epoch, number), window)][-_KEPT_WINDOWS:]
            self._windows = dict(kept)  # replaced as a whole: a prefetching thread may plan at the same time
        size = self.settings.global_batch_size
        start = (step_in_epoch - self._first_step(number)) * size
        chosen = np.arange(start, min(start + size, len(window.samples)))
        return window.samples.take(chosen), None if window.costs is None else _take(window.costs, chosen)

    def _window_of(self, step_in_epoch: int) -> int:
        """Return the window that a step lies in; windows differ by at most one step in length."""
        return ((step_in_epoch + 1) * self._num_windows - 1) // self.steps_per_epoch

    def _first_step(self, window: int) -> int:
        return window * self.steps_per_epoch // self._num_windows

    def _plan_window(self, epoch: int, number: int) -> _Window:
        settings = self.settings
        order = EpochOrder(self._shapes, settings.seed, epoch, self.num_groups, settings.shuffle)
        size = settings.global_batch_size
        stop = min(self._first_step(number + 1) * size, self.num_epoch_samples)
        samples = order.window(self._first_step(number) * size, stop)
        costs = self._predict(samples.source, samples.row) if self._needs_costs else None
        if settings.shuffle:
            state = (settings.seed, epoch, number)
            ordered = order_window(samples, size, state, costs if settings.by_length else None)
        elif settings.by_length and costs is not None:
            ordered = np.lexsort((np.arange(len(samples)), -costs.tokens, np.arange(len(samples)) // size))
        else:
            return _Window(samples, costs)
        return _Window(samples.take(ordered), None if costs is None else _take(costs, ordered))

    def _predict(self, source: NDArray[np.integer], rows: NDArray[np.int64]) -> Costs:
        """Predict costs, asking for each source's rows in their order: each shard's index is then opened once."""
        costs = Costs(*(np.zeros(len(rows), dtype=np.int64) for _ in range(3)))
        for number in range(len(self._sources)):
            chosen = np.flatnonzero(source == number)
            if len(chosen):
                chosen = chosen[np.argsort(rows[chosen], kind="stable")]
                found = self._lengths.costs(number, rows[chosen])
                costs.tokens[chosen], costs.patches[chosen] = found.tokens, found.patches
                costs.batch_key[chosen] = found.batch_key
        return costs


def _take(costs: Costs, chosen: NDArray[np.int64]) -> Costs:
    return Costs(costs.tokens[chosen], costs.patches[chosen], costs.batch_key[chosen])


def _num_epoch_samples(source: Source, repeat: float) -> int:
    if not (math.isfinite(repeat) and repeat > 0):
        raise DataError(f"{source.name}: repeat must be above 0, got {repeat}")
    return math.floor(repeat * len(source) + _ROUNDING)
