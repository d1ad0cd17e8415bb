"""Operations that torch counts while a tiny model of a family is trained, to compare the formulas with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from tests.unit.families.subjects import Subject, inputs_of
from vlm_dist.config.peft import PeftConfig
from vlm_dist.data.types import IGNORE_INDEX, MicroBatch
from vlm_dist.loss.labelled import LabelledHead
from vlm_dist.model import attach_adapter, enable_gradient_checkpointing, run_frozen_towers_without_graph
from vlm_dist.model.attention.choice import use_varlen

LANGUAGE = {"vision": "freeze", "projector": "freeze", "language": "lora"}
EVERYWHERE = {"vision": "lora", "projector": "lora", "language": "lora"}
PROJECTOR = {"vision": "freeze", "projector": "full", "language": "lora"}
TOWER = {"vision": "full", "projector": "full", "language": "lora"}
TOWER_ALONE = {"vision": "lora", "projector": "freeze", "language": "freeze"}
FULL = {"vision": "full", "projector": "full", "language": "full"}

#: Every family that can be trained.
FAMILIES = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "llava", "llava_next", "llava_next_video", "llava_onevision",
    "internvl", "paligemma", "gemma3", "idefics2", "idefics3", "smolvlm", "pixtral", "mistral3",
)  # fmt: skip
#: Those that see clips.
CLIPS = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "llava_next_video", "llava_onevision", "internvl", "smolvlm"
)  # fmt: skip


def trained(
    one: Subject,
    policy: Mapping[str, str],
    *,
    recomputed: bool = False,
    language: Any = "all",
    targets: Any = "all-linear",
    eager: bool = False,
    varlen: bool = False,
    **lora: Any,
) -> Any:
    """The model of a family, made ready as a run does it.

    Args:
        one: the family.
        policy: of its towers.
        recomputed: with gradient checkpointing.
        language: which blocks of the language model, then.
        targets: of LoRA.
        eager: attention whose scores are there.
        varlen: attention of each sample of a pack over itself.
        **lora: of `PeftConfig`, besides.
    """
    settings = PeftConfig(**{"r": 4, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": targets, **lora})
    base = one.load_model()
    if eager:
        base.set_attn_implementation("eager")
    if varlen:
        use_varlen(base)
    model = attach_adapter(base, settings, policy)
    if recomputed:
        enable_gradient_checkpointing(model, language=language)
    run_frozen_towers_without_graph(model)
    return model


def measured(model: Any, batch: MicroBatch) -> int:
    """What torch counts of a forward and backward with the loss of this project."""
    head = LabelledHead(model)
    model.train()
    with FlopCounterMode(display=False) as flops, head.giving_loss(batch.labels, IGNORE_INDEX):
        model(**inputs_of(batch), use_cache=False)["loss"].backward()
    return int(flops.get_total_flops())
