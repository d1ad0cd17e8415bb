"""From a run file and a machine to bytes, seconds and a recommendation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_dist.build.meta_model import meta_model
from vlm_dist.config import RunConfig
from vlm_dist.config.arithmetic import BatchArithmetic, resolve_batch
from vlm_dist.engine.deepspeed_json import load_deepspeed_json
from vlm_dist.engine.merge import merge_deepspeed_config
from vlm_dist.errors import ConfigError
from vlm_dist.estimate.activations import block_bytes
from vlm_dist.estimate.batch import BatchShape
from vlm_dist.estimate.memory import Activations, Memory, Ranks, Variant, at_batch, held, largest_factor
from vlm_dist.estimate.model import Weights, count_language_blocks, count_weights, recomputing
from vlm_dist.estimate.shapes import Shapes, make_shapes
from vlm_dist.estimate.time import StepTime, link_rate, step_time
from vlm_dist.model.checkpointing import base_model
from vlm_dist.model.devices import find_gpu
from vlm_dist.model.flops import FlopModel, Flops
from vlm_dist.model.quantization import check_quantization
from vlm_dist.model.visual_tokens import visual_layout

#: DeepSpeed's own persistence threshold, where the JSON names none.
_PERSISTENCE = 100_000
#: Of a GPU's memory, what an estimate may fill: it is off by some percent.
SAFE_SHARE = 0.95


@dataclass(frozen=True)
class Machine:
    """What a run is to go on.

    Attributes:
        ranks: GPUs and nodes.
        memory_bytes: of each GPU.
        gpu: its name.
        peak: its operations per second.
        efficiency: share of the peak at which it computes.
        link: name of the slowest link between ranks.
        rate: its bytes per second.
    """

    ranks: Ranks
    memory_bytes: float
    gpu: str
    peak: float
    efficiency: float
    link: str
    rate: float


@dataclass(frozen=True)
class Row:
    """One way to hold the model.

    Attributes:
        variant: stage, offloading, checkpointing.
        largest: bytes at the largest micro-batch.
        typical: bytes at the mean micro-batch; None where nothing tells.
        fits: whether the largest fits, with what estimates are off by to spare.
        largest_units: the most samples per device that fit; of packs, the most tokens.
        time: of a step of mean micro-batches (of largest ones where nothing tells).
        flops: of such a micro-batch.
        is_run: the run file asks for this one.
    """

    variant: Variant
    largest: Memory
    typical: Memory | None
    fits: bool
    largest_units: int
    time: StepTime
    flops: Flops
    is_run: bool


@dataclass(frozen=True)
class Estimate:
    """Everything that is reported."""

    config: RunConfig
    machine: Machine
    batch: BatchArithmetic
    weights: Weights
    shapes: Shapes
    rows: tuple[Row, ...]

    @property
    def run(self) -> Row:
        """As the run file has it."""
        return next(row for row in self.rows if row.is_run)

    @property
    def timed(self) -> BatchShape:
        """The micro-batch that steps are timed with."""
        return self.shapes.typical or self.shapes.largest


def machine_of(
    gpus: int, nodes: int, memory: float | None, gpu: str, interconnect: str | None, efficiency: float
) -> Machine:
    """Check what was said of the machine.

    Args:
        gpus: of each node.
        nodes: machines.
        memory: GiB of a GPU; None: as its name says.
        gpu: its name.
        interconnect: see `link_rate`.
        efficiency: share of the peak.

    Raises:
        ConfigError: names the flag.
    """
    for flag, value in (("--gpus", gpus), ("--nodes", nodes)):
        if value < 1:
            raise ConfigError(f"{flag} {value}: expected 1 or more")
    found = find_gpu(gpu)
    if found is None:
        raise ConfigError(f"--gpu {gpu}: not known; write the name of the chip, such as H100, A100, L40S or RTX 4090")
    if memory is not None and memory <= 0:
        raise ConfigError(f"--gpu-memory {memory:g}: expected GiB of one GPU, such as 80")
    if not 0 < efficiency <= 1:
        raise ConfigError(f"--efficiency {efficiency:g}: expected a share of the peak above 0 and up to 1, such as 0.4")
    ranks = Ranks(gpus, nodes)
    link, rate = link_rate(interconnect, ranks)
    size = (memory if memory is not None else found.memory_gb) * 2**30
    return Machine(ranks, size, found.name, found.tflops * 1e12, efficiency, link, rate)


def estimate(config: RunConfig, machine: Machine) -> Estimate:
    """Work everything out.

    Args:
        config: of the run.
        machine: that it is to go on.

    Raises:
        ConfigError, ModelError: the run could not start for the same reason.
    """
    content = load_deepspeed_json(config.deepspeed)
    stage = content["zero_optimization"]["stage"]
    check_quantization(config.peft.quantization, stage)
    batch = resolve_batch(config.train, machine.ranks.world_size)
    model = meta_model(config)
    zero = {key: value for key, value in content["zero_optimization"].items() if not isinstance(value, Mapping)}
    weights = count_weights(model, config, zero.get("stage3_param_persistence_threshold", _PERSISTENCE))
    merged, _ = merge_deepspeed_config(
        content, per_device_train_batch_size=batch.per_device, bf16=config.train.bf16, fp16=config.train.fp16,
        max_grad_norm=config.train.max_grad_norm, world_size=machine.ranks.world_size,
        num_nodes=machine.ranks.num_nodes, num_trainable=weights.num_trained,
    )  # fmt: skip
    shapes = make_shapes(config, visual_layout(base_model(model)), batch)
    maker = _Rows(config, model, own_variant(config, content), weights, shapes, machine, merged["zero_optimization"])
    rows = [row for recomputes in (False, True) for row in maker.of(_variants(maker.own, recomputes, config))]
    rows += maker.with_some_blocks(rows)
    return Estimate(config, machine, batch, weights, shapes, tuple(rows))


def own_variant(config: RunConfig, content: Mapping[str, Any]) -> Variant:
    """What the run file asks for."""
    zero = content["zero_optimization"]

    def moved(part: str) -> bool:
        return (zero.get(part) or {}).get("device") not in (None, "none")

    return Variant(
        zero["stage"], moved("offload_optimizer"), moved("offload_param"), config.train.gradient_checkpointing
    )


def _variants(own: Variant, recomputes: bool, config: RunConfig) -> list[Variant]:
    """What the presets offer, and what the run file asks for."""
    made = [
        Variant(2, recomputes=recomputes),
        Variant(3, recomputes=recomputes),
        Variant(2, True, recomputes=recomputes),
        Variant(3, True, True, recomputes),
    ]
    if config.peft.quantization != "none":
        made = [variant for variant in made if variant.stage < 3]
    mine = Variant(own.stage, own.offloads_optimizer, own.offloads_base, recomputes)
    return made if mine in made else [mine, *made]


def _preset(directory: Path, stage: int) -> Mapping[str, Any]:
    """Values of the preset of a stage that lies beside the run's own JSON; else DeepSpeed's."""
    path = directory / f"zero{stage}.json"
    if not path.is_file():
        return {}
    found: dict[str, Any] = load_deepspeed_json(path)["zero_optimization"]
    return found


@dataclass(frozen=True)
class _Rows:
    """Makes the rows of a table."""

    config: RunConfig
    model: Any
    own: Variant
    weights: Weights
    shapes: Shapes
    machine: Machine
    zero: Mapping[str, Any]

    def of(self, variants: Sequence[Variant]) -> list[Row]:
        """Rows of variants that recompute the same blocks."""
        first = variants[0]
        with recomputing(self.model, self.config, first.recomputes, first.first_blocks):
            counter = FlopModel.of(self.model, self.config.collator.label_masking.ignore_index)
            parts = counter.products, counter.attentions
            dropout, size = self.config.peft.lora_dropout, self.weights.element_bytes
            blocks = block_bytes(self.model, size, dropout, parts=parts)
        head = next((p for p in counter.products if p.tower == "head"), None)
        pixels = next((p for p in counter.products if p.stream == "pixels"), None)
        kept = Activations(blocks, head, pixels, self.weights.element_bytes, counter.packs_need_mask)
        return [self._row(variant, kept, counter) for variant in variants]

    def with_some_blocks(self, rows: Sequence[Row]) -> list[Row]:
        """Where all blocks recomputed fit and none does not: the fewest that fit."""
        by_variant = {row.variant: row for row in rows}
        count = count_language_blocks(self.model)
        found = []
        for base in dict.fromkeys((replace(self.own, recomputes=True), Variant(2))):
            kept, again = by_variant.get(replace(base, recomputes=False)), by_variant.get(base)
            if kept is None or again is None or kept.fits or not again.fits:
                continue
            low, high = 1, count
            while low < high:
                middle = (low + high) // 2
                (row,) = self.of([replace(base, first_blocks=middle)])
                low, high = (low, middle) if row.fits else (middle + 1, high)
            if 0 < low < count:
                found += self.of([replace(base, first_blocks=low)])
        return found

    def _row(self, variant: Variant, kept: Activations, counter: FlopModel) -> Row:
        shapes, machine = self.shapes, self.machine
        zero = self.zero if variant.stage == self.own.stage else _preset(self.config.deepspeed.parent, variant.stage)
        fixed = held(self.weights, variant, machine.ranks, zero)
        largest = at_batch(fixed, kept, shapes.largest)
        typical = at_batch(fixed, kept, shapes.typical) if shapes.typical is not None else None
        timed = shapes.typical or shapes.largest
        flops = counter.count_tokens(timed.text, timed.visual, timed.num_labelled)
        time = step_time(
            flops, shapes.micro_batches, self.weights, variant, machine.ranks, machine.rate, machine.peak,
            machine.efficiency,
        )  # fmt: skip
        room = SAFE_SHARE * machine.memory_bytes
        units = largest_factor(fixed, kept, shapes.unit, room)
        return Row(variant, largest, typical, largest.total <= room, units, time, flops, variant == self.own)
