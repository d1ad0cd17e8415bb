"""Seconds of a step, from operations, from bytes on the wire, and from stated rates."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_dist.distributed.zero_traffic import Traffic
from vlm_dist.errors import ConfigError
from vlm_dist.estimate.memory import Ranks, Variant
from vlm_dist.estimate.model import Weights
from vlm_dist.model.flops import Flops

#: Bytes per second that a rank (within a node) or a node (between nodes) sends, of links as they are sold.
LINKS = {
    "nvlink": 300e9,  # A100: 300, H100: 450 in each direction
    "pcie": 25e9,  # PCIe 4.0 x16
    "infiniband": 50e9,  # 400 Gb/s for each node
    "ethernet": 12.5e9,  # 100 Gb/s
}
#: Adam's updates on a CPU, elements per second of each rank; bytes per second between CPU and GPU.
_CPU_ADAM, _TO_GPU = 5e8, 20e9


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step.

    Attributes:
        compute: of a rank.
        sending: of ZeRO's collectives, if nothing else went on.
        host: of an offloaded optimizer and of moving offloaded weights.
    """

    compute: float
    sending: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """Collectives run beside the computation, the optimizer after it."""
        return max(self.compute, self.sending) + self.host


def link_rate(name: str | None, ranks: Ranks) -> tuple[str, float]:
    """Name and bytes per second of the slowest link between ranks.

    Args:
        name: of `LINKS`, or a number of GB/s; None: NVLink within a node, InfiniBand between nodes.
        ranks: of the run.

    Raises:
        ConfigError: neither.
    """
    if name is None:
        name = "nvlink" if ranks.num_nodes == 1 else "infiniband"
    if name in LINKS:
        return f"{name} ({LINKS[name] / 1e9:g} GB/s)", LINKS[name]
    try:
        rate = float(name)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ConfigError(f"--interconnect {name}: expected one of {', '.join(LINKS)}, or a number of GB/s such as 25")
    return f"{rate:g} GB/s", rate * 1e9


def step_time(
    flops: Flops,
    micro_batches: float,
    weights: Weights,
    variant: Variant,
    ranks: Ranks,
    rate: float,
    peak: float,
    efficiency: float,
) -> StepTime:
    """Seconds of an optimizer step.

    Args:
        flops: of a micro-batch.
        micro_batches: of a step, per rank.
        weights: of the model.
        variant: stage and offloading.
        ranks: of the run.
        rate: bytes per second of the slowest link.
        peak: operations per second of a GPU.
        efficiency: share of the peak at which a GPU computes, recomputation included.
    """
    large = weights.num_frozen - weights.num_small_frozen
    keeps = variant.stage == 3 and ranks.num_nodes > 1
    traffic = Traffic(
        variant.stage,
        ranks.world_size,
        max(1, round(micro_batches)),
        weights.num_trained,
        large,
        keeps_base_in_node=keeps,
    )
    sending = traffic.sent_bytes / rate if ranks.world_size > 1 else 0.0
    if keeps and ranks.num_gpus > 1:  # the base is gathered inside each node
        inside = Traffic(3, ranks.num_gpus, max(1, round(micro_batches)), 0, large)
        sending += inside.sent_bytes / LINKS["nvlink"]
    host = 0.0
    if variant.offloads_optimizer:
        share = weights.num_trained / ranks.world_size
        host += share / _CPU_ADAM + (4 + weights.element_bytes) * share / _TO_GPU
    if variant.offloads_base:
        sending += micro_batches * 2 * weights.element_bytes * large / ranks.world_size / _TO_GPU
    return StepTime(flops.hardware * micro_batches / (peak * efficiency), sending, host)
