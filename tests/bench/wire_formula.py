"""What each stage of ZeRO has to send in an optimizer step, for rings of ranks as NCCL and gloo build them.

In a ring of N, a reduce-scatter or an all-gather of S bytes has every member send (N-1)/N x S; an all-reduce is both.
A ring enters and leaves each node once, so that the bytes on the wire hardly grow with the ranks of a node.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Gradients are summed in float32; weights are sent as they are computed with, in bfloat16.
GRADIENT_BYTES = 4
WEIGHT_BYTES = 2


@dataclass(frozen=True)
class Layout:
    """What is trained how.

    Attributes:
        stage: of ZeRO.
        num_nodes: in the ring.
        accumulation: micro-batches of a step, per rank.
        num_trained: elements of LoRA.
        num_gathered: elements of the base that ZeRO-3 cuts and gathers: those of parameters above
            `stage3_param_persistence_threshold`.
        keeps_base_in_node: hpZ, whose frozen shards every node has whole.
        reduces_whole: a reduce-scatter is done as an all-reduce, as torch's gloo does; NCCL has a ring of its own.
        gathers: how often ZeRO-3 gathers the base in a micro-batch: in forward, and again in backward.
    """

    stage: int
    num_nodes: int
    accumulation: int
    num_trained: int
    num_gathered: int
    keeps_base_in_node: bool = False
    reduces_whole: bool = False
    gathers: int = 2


def bytes_sent_by_a_node(layout: Layout) -> float:
    """Bytes of one optimizer step that leave each node.

    Stages 0 to 2 send nothing but what is trained. Stage 1 sums the gradients once a step; stage 2 in every
    micro-batch, since a rank keeps but its share of them, and by an all-reduce (DeepSpeed's default,
    `use_multi_rank_bucket_allreduce`). Stage 3 scatters them, and gathers the base.
    """
    gradients = GRADIENT_BYTES * layout.num_trained
    weights = WEIGHT_BYTES * layout.num_trained
    all_reduced, scattered = 2 * gradients, (2 if layout.reduces_whole else 1) * gradients
    base = 0 if layout.keeps_base_in_node else layout.gathers * WEIGHT_BYTES * layout.num_gathered
    sent = {
        0: all_reduced,
        1: all_reduced + weights,
        2: layout.accumulation * all_reduced + weights,
        3: layout.accumulation * (scattered + base) + weights,
    }[layout.stage]
    return (layout.num_nodes - 1) / layout.num_nodes * sent
