"""What a law reads, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlm_dist.config.data import DataConfig
from vlm_dist.config.peft import PeftConfig
from vlm_dist.config.train import TrainConfig
from vlm_dist.config.vlm_collator import VlmCollatorConfig
from vlm_dist.config.vlm_model import VlmModelConfig
from vlm_dist.config.yaml_document import KeyPath


@dataclass(frozen=True, slots=True)
class Draft:
    """The five sections; a section with errors has defaults in the place of what is wrong."""

    model_id: str | None
    model: VlmModelConfig
    collator: VlmCollatorConfig
    train: TrainConfig
    peft: PeftConfig
    data: DataConfig


@dataclass(frozen=True, slots=True)
class Finding:
    """What a law found.

    Attributes:
        path: the value that is to be changed.
        message: what is wrong with it.
        also: other values that the law read.
        is_notice: legal, only worth a line.
    """

    path: KeyPath
    message: str
    also: tuple[KeyPath, ...] = field(default=())
    is_notice: bool = False
