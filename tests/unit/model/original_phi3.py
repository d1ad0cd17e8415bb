"""A small Phi-3-vision in the format of its own code, which is not ours to ship: it must be at hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from vlm_dist.config.vlm_model import ModelClassEntry

ENTRY = ModelClassEntry(model_class="Phi3VForCausalLM", processor_class="Phi3VProcessor")
#: Names the directory with the published code and tokenizer.
VARIABLE = "VLM_DIST_PHI3V_REMOTE_CODE"


def save_phi3_vision(source: Path, directory: Path) -> Path:
    """Write a checkpoint with two layers in each tower; its vision tower cannot be made narrower.

    Args:
        source: has the published code, its config and its tokenizer.
        directory: to write into.
    """
    directory.mkdir(parents=True)
    for file in (*source.glob("*phi3_v.py"), *source.glob("*token*.json"), source / "preprocessor_config.json"):
        shutil.copy(file, directory)
    code = directory / "image_embedding_phi3_v.py"
    code.write_text(code.read_text().replace("  num_hidden_layers=24,", "  num_hidden_layers=2,"))
    config = json.loads((source / "config.json").read_text())
    small = {"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 128}
    config |= small | {"num_attention_heads": 1, "num_key_value_heads": 1}
    (directory / "config.json").write_text(json.dumps(config))
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    model_class = get_class_from_dynamic_module("modeling_phi3_v.Phi3VForCausalLM", str(directory))
    settings = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    settings._attn_implementation = "eager"
    torch.manual_seed(0)
    weights = {name: value.clone() for name, value in model_class(settings).state_dict().items() if "wte" not in name}
    # the published files have the vision tower's names of transformers 4
    published_names = {name.replace("img_processor.", "img_processor.vision_model."): w for name, w in weights.items()}
    save_file(published_names, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
