"""`peft_config.yaml`: the LoRA adapter, and which towers of the model get one. Names are PEFT's."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from vlm_dist.config.section import Count, ModulePattern, Names, PathField, PositiveNumber, Section

_LATER = "not yet supported"

TowerPolicy = Literal["freeze", "lora", "full"]


class TowerPolicies(Section):
    """What is trained of each part of the model: nothing (freeze), LoRA layers (lora), or its own weights (full)."""

    vision: TowerPolicy = "lora"
    projector: TowerPolicy = "lora"
    language: TowerPolicy = "lora"


class TowerLearningRates(Section):
    """Peak learning rates of single towers; null: train.learning_rate. The schedule scales all alike."""

    vision: PositiveNumber | None = None
    projector: PositiveNumber | None = None
    language: PositiveNumber | None = None


class PeftConfig(Section):
    """`target_modules` are looked for only in the towers whose policy is lora."""

    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    r: Count = 64
    target_modules: ModulePattern = "all-linear"
    lora_alpha: Count = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    #: Modules trained in full, by name or end of name.
    modules_to_save: Names = ()
    #: Of the frozen base: in the training dtype, or in 4 bits (QLoRA).
    quantization: Literal["none", "nf4"] = "none"
    #: A directory to start from, instead of from zero: an adapter in PEFT's format, or weights trained in full.
    adapter: PathField | None = None
    towers: TowerPolicies = Field(default_factory=TowerPolicies)
    towers_learning_rate: TowerLearningRates = Field(default_factory=TowerLearningRates)

    foreign_keys: ClassVar[dict[str, str]] = {
        "peft_type": "the adapter is always LoRA; without one: towers with full, and none with lora",
        "exclude_modules": f"{_LATER}; freeze a tower, or let target_modules be a regular expression",
        "init_lora_weights": f"{_LATER}; PEFT's default initialisation is used",
        "layers_to_transform": f"{_LATER}; let target_modules be a regular expression over full module names",
        "layers_pattern": f"{_LATER}; let target_modules be a regular expression over full module names",
        "rank_pattern": f"{_LATER}; one r for all modules",
        "alpha_pattern": f"{_LATER}; one lora_alpha for all modules",
        "target_parameters": f"{_LATER}; use target_modules",
        "trainable_token_indices": _LATER,
        "layer_replication": _LATER,
        "lora_bias": _LATER,
        "fan_in_fan_out": "PEFT finds out by itself",
        "inference_mode": "always false in training",
        "lora_r": "the key is r",
        "finetuning_type": "the key is towers: freeze, lora or full for each part of the model",
        "freeze_vision_tower": "the key is towers.vision: freeze",
        "freeze_multi_modal_projector": "the key is towers.projector: freeze",
        "freeze_language_model": "the key is towers.language: freeze",
        "quantization_bit": "the key is quantization: nf4",
        "load_in_4bit": "the key is quantization: nf4",
        "load_in_8bit": "the key is quantization: nf4; 8 bits are not supported",
        "adapter_name_or_path": "the key is adapter",
        "additional_target": "the key is modules_to_save",
    }
