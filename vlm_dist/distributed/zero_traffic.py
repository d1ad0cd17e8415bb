"""What each stage of ZeRO sends in an optimizer step, for rings of ranks as NCCL and gloo build them.

In a ring of W, a reduce-scatter or an all-gather of S bytes has every rank send (W-1)/W x S; an all-reduce is both. A
ring leaves each node once, so that this is what a node sends, too, however many ranks it has. The counters of network
devices agree to 2% (docs/benchmarks/nodes.md).
"""

from __future__ import annotations

from dataclasses import dataclass

#: Gradients are summed in float32; weights are sent as they are computed with, in bfloat16.
GRADIENT_BYTES = 4
WEIGHT_BYTES = 2


@dataclass(frozen=True)
class Traffic:
    """What is trained how.

    Attributes:
        stage: of ZeRO.
        num_ranks: W, in the ring.
        accumulation: micro-batches of a step, per rank.
        num_trained: n, elements of LoRA.
        num_gathered: N, elements of the base that ZeRO-3 cuts and gathers: those of parameters above
            `stage3_param_persistence_threshold`.
        keeps_base_in_node: hpZ, where every node has the whole base.
        reduces_whole: a reduce-scatter is done as an all-reduce, as torch's gloo does; NCCL has a ring of its own.
    """

    stage: int
    num_ranks: int
    accumulation: int
    num_trained: int
    num_gathered: int
    keeps_base_in_node: bool = False
    reduces_whole: bool = False

    @property
    def sent_bytes(self) -> float:
        """Bytes of one optimizer step that leave each node.

        Stages 0 to 2 send nothing but what is trained. Stage 1 sums the gradients once a step; stage 2 in every
        micro-batch, since a rank keeps but its share of them, and by an all-reduce (DeepSpeed's default,
        `use_multi_rank_bucket_allreduce`). Stage 3 scatters them, and gathers the base in forward and in backward.
        """
        gradients = GRADIENT_BYTES * self.num_trained
        weights = WEIGHT_BYTES * self.num_trained
        all_reduced, scattered = 2 * gradients, (2 if self.reduces_whole else 1) * gradients
        base = 0 if self.keeps_base_in_node else 2 * WEIGHT_BYTES * self.num_gathered
        sent = {
            0: all_reduced,
            1: all_reduced + weights,
            2: self.accumulation * all_reduced + weights,
            3: self.accumulation * (scattered + base) + weights,
        }[self.stage]
        return (self.num_ranks - 1) / self.num_ranks * sent
