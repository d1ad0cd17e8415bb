"""Bytes on one GPU, part by part, for a stage of ZeRO and a micro-batch. Formulas: docs/estimate.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_dist.estimate.activations import BlockBytes
from vlm_dist.estimate.batch import BatchShape
from vlm_dist.estimate.model import Weights
from vlm_dist.loss.labelled import MAX_CHUNK_ELEMENTS
from vlm_dist.model.flop_parts import Product

GIB = 2**30
#: CUDA's context and libraries, NCCL's buffers, cuBLAS's workspaces.
FRAMEWORK_BYTES = 1.5 * GIB
#: Of activations, what the allocator loses between pieces of different sizes.
PIECES_SHARE = 0.05
#: DeepSpeed's own values of stage 3, where the JSON names none.
_MAX_LIVE, _MAX_BUCKET = 1_000_000_000, 500_000_000

#: The parts, in the order of reports.
PARTS = (
    "base", "adapter", "optimizer", "gradients", "activations", "vision activations", "logits and loss",
    "gathered and buckets", "framework",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A way to hold a model.

    Attributes:
        stage: of ZeRO.
        offloads_optimizer: masters and moments are in the machine's memory.
        offloads_base: the frozen weights, too (stage 3).
        recomputes: gradient checkpointing is on.
        first_blocks: of the language model are recomputed, so many; None: as the run's policy says.
    """

    stage: int
    offloads_optimizer: bool = False
    offloads_base: bool = False
    recomputes: bool = True
    first_blocks: int | None = None

    @property
    def name(self) -> str:
        """In a few words."""
        return f"ZeRO-{self.stage}" + (" + offload" if self.offloads_optimizer or self.offloads_base else "")


@dataclass(frozen=True)
class Memory:
    """Bytes at the worst moment of a step.

    Attributes:
        parts: name of `PARTS` -> bytes on each GPU.
        host: bytes in the machine's memory, for each GPU.
        moment: which it is.
    """

    parts: Mapping[str, float]
    host: float = 0.0
    moment: str = ""

    @property
    def total(self) -> float:
        """Bytes on each GPU."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Ranks:
    """Where a run is to go.

    Attributes:
        num_gpus: of each node.
        num_nodes: machines.
    """

    num_gpus: int
    num_nodes: int = 1

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.num_gpus * self.num_nodes


def held(weights: Weights, variant: Variant, ranks: Ranks, zero: Mapping[str, Any]) -> Memory:
    """What is held between steps, and the buffers of ZeRO: everything that no micro-batch decides.

    Args:
        weights: of the model.
        variant: stage and offloading.
        ranks: that share it.
        zero: `zero_optimization` of a DeepSpeed JSON.
    """
    world, size, trained = ranks.world_size, weights.element_bytes, weights.num_trained
    base, adapter = weights.frozen_bytes, float(size * trained)
    optimizer, gradients = 12.0 * trained, 4.0 * trained
    buckets = 0.0
    if variant.stage >= 1:
        optimizer /= world
        buckets = 4.0 * zero.get("reduce_bucket_size", min(trained, _MAX_BUCKET))
    if variant.stage >= 2:
        gradients /= world
    host = 0.0
    if variant.stage == 3:
        small, large = weights.num_small_frozen, weights.num_frozen - weights.num_small_frozen
        base = size * (small + large / world)
        adapter = size * (weights.num_small_trained + (trained - weights.num_small_trained) / world)
        per_node = zero.get("zero_hpz_partition_size", ranks.num_gpus if ranks.num_nodes > 1 else 1)
        if per_node > 1:
            base += size * large / per_node
        if variant.offloads_base:
            host += size * large / world
            base = float(size * small)
        buckets += size * min(large, zero.get("stage3_max_live_parameters", _MAX_LIVE))
    if variant.offloads_optimizer:
        host += optimizer
        optimizer = 0.0
    parts = dict.fromkeys(PARTS, 0.0)
    parts |= {"base": base, "adapter": adapter, "optimizer": optimizer, "gradients": gradients}
    parts |= {"gathered and buckets": buckets, "framework": FRAMEWORK_BYTES}
    return Memory(parts, host)


@dataclass(frozen=True)
class Activations:
    """What a model keeps of a micro-batch, with gradient checkpointing as it was set.

    Attributes:
        blocks: of the model.
        head: its product.
        pixels: the product that reads pixels; None without a vision tower.
        element_bytes: of an activation.
        packs_need_mask: whether attention tells the samples of a pack apart by a mask.
    """

    blocks: Sequence[BlockBytes]
    head: Product | None
    pixels: Product | None
    element_bytes: int
    packs_need_mask: bool = True

    def at(self, shape: BatchShape) -> tuple[str, dict[str, float]]:
        """The worst moment, and its bytes: "activations" (language), "vision activations" and "logits and loss".

        Moments: the vision tower's forward; the loss; the backward of the language model and of the vision tower,
        where the block that is computed again has all that it keeps, and gradients besides.
        """
        streams = {"language": float(shape.text.computed), **shape.visual.streams}
        pairs = shape.text.computed_squares
        saved = {"language": 0.0, "vision": 0.0}
        again = {"language": 0.0, "vision": 0.0}
        gradients = {"language": 0.0, "vision": 0.0}
        passing = 0.0
        for block in self.blocks:
            tower = "language" if block.tower == "language" else "vision"
            whole = _bytes(block.kept, streams) + (block.scores if self._has_mask(shape) else 0.0) * pairs
            if block.is_recomputed and block.has_graph:
                saved[tower] += _bytes(block.kept_again, streams)
                again[tower] = max(again[tower], whole)
            else:
                saved[tower] += whole
            if block.has_graph:
                gradients[tower] = max(gradients[tower], _bytes(block.gradients, streams))
            if tower == "vision":
                passing = max(passing, _bytes(block.passing, streams))
        inputs = self._inputs(shape, streams)
        features = self._features(streams)
        text = saved["language"] + self._rows(shape)
        loss = self._loss(shape)
        moments: dict[str, dict[str, float]] = {
            "forward of the vision tower": {"vision activations": saved["vision"] + passing + inputs},
            "loss": {
                "activations": text,
                "vision activations": saved["vision"] + inputs + features,
                "logits and loss": loss,
            },
            "backward of the vision tower": {
                "vision activations": saved["vision"] + again["vision"] + gradients["vision"] + inputs
            },
            "backward of the language model": {
                "activations": text + again["language"] + gradients["language"],
                "vision activations": saved["vision"] + inputs + features,
                "logits and loss": self._rows_of_head(shape),
            },
        }
        name = max(moments, key=lambda moment: sum(moments[moment].values()))
        found = {
            part: moments[name].get(part, 0.0) for part in ("activations", "vision activations", "logits and loss")
        }
        return name, found | {"framework": FRAMEWORK_BYTES + PIECES_SHARE * sum(found.values())}

    def _has_mask(self, shape: BatchShape) -> bool:
        return self.packs_need_mask if shape.is_packed else shape.has_mask

    def _inputs(self, shape: BatchShape, streams: Mapping[str, float]) -> float:
        """Pixels, in float32."""
        return 0.0 if self.pixels is None else 4.0 * self.pixels.in_features * streams.get("pixels", 0.0)

    def _features(self, streams: Mapping[str, float]) -> float:
        width = 0 if self.head is None else self.head.in_features
        return float(self.element_bytes * width * streams.get("features/4", 0.0))

    def _rows(self, shape: BatchShape) -> float:
        """Embeddings, twice, as pictures are put into them; and the mask."""
        width = 0 if self.head is None else self.head.in_features
        mask = shape.text.computed_squares if self._has_mask(shape) else 0.0
        return 2.0 * self.element_bytes * width * shape.text.computed + mask

    def _rows_of_head(self, shape: BatchShape) -> float:
        return 0.0 if self.head is None else 2.0 * self.element_bytes * self.head.in_features * shape.num_labelled

    def _loss(self, shape: BatchShape) -> float:
        """A chunk of logits, its float32 copy and its gradient; what comes in, and its gradient."""
        if self.head is None:
            return 0.0
        positions = shape.num_labelled if self.head.stream == "head" else shape.text.computed
        elements = float(self.head.out_features * positions)
        if self.head.stream == "head":
            elements = min(elements, float(MAX_CHUNK_ELEMENTS))
        weight = 4.0 * self.head.weights if self.head.has_weight_gradient else 0.0
        return (2 * self.element_bytes + 4.0) * elements + self._rows_of_head(shape) + weight


def at_batch(fixed: Memory, activations: Activations, shape: BatchShape) -> Memory:
    """All parts for a micro-batch."""
    moment, parts = activations.at(shape)
    return Memory({**fixed.parts, **parts}, fixed.host, moment)


def largest_factor(fixed: Memory, activations: Activations, unit: BatchShape, room: float, limit: int = 1024) -> int:
    """The most samples that fit; of a pack the most tokens, in steps of 1/64 of it; 0 where not one does.

    Args:
        fixed: from `held`.
        activations: of the model.
        unit: one sample, or a pack.
        room: bytes of a GPU.
        limit: that nobody wants more than.
    """
    step = 1 / 64 if unit.is_packed else 1.0

    def fits(count: int) -> bool:
        return at_batch(fixed, activations, unit.times(count * step)).total <= room

    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return int(unit.text.computed * low * step) if unit.is_packed else low


def _bytes(per_token: Mapping[str, float], streams: Mapping[str, float]) -> float:
    return sum(count * streams.get(stream, 0.0) for stream, count in per_token.items())
