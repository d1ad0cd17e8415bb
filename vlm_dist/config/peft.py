"""`peft_config.yaml`: the LoRA adapter, and which towers of the model get one. Names are PEFT's."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from vlm_dist.config.section import Count, ModulePattern, Section, not_yet_supported

_LATER = "not yet supported"

TowerPolicy = Annotated[
    Literal["freeze", "lora", "full"],
    not_yet_supported("full", instead="use lora or freeze"),
]


class TowerPolicies(Section):
    """What is trained of each part of the model: nothing (freeze) or its LoRA layers (lora)."""

    vision: TowerPolicy = "lora"
    projector: TowerPolicy = "lora"
    language: TowerPolicy = "lora"


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
    towers: TowerPolicies = Field(default_factory=TowerPolicies)

    foreign_keys: ClassVar[dict[str, str]] = {
        "peft_type": "the adapter is always LoRA",
        "modules_to_save": f"{_LATER}; only LoRA layers (and biases, with bias) are trained",
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
    }
