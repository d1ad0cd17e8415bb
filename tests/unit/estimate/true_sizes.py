"""config.json of models as they are published: sizes alone, no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_QWEN: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "num_hidden_layers": 28,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "torch_dtype": "bfloat16",
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 32,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}

#: Name -> config.json, classes of model and processor, and number of weights.
MODELS: dict[str, tuple[dict[str, Any], str, str, int]] = {
    "Qwen2-VL-2B": (
        {
            **_QWEN,
            "model_type": "qwen2_vl",
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "max_position_embeddings": 32768,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "vocab_size": 151936,
            "vision_config": {**_QWEN_VISION, "embed_dim": 1280, "mlp_ratio": 4, "hidden_size": 1536},
        },
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLProcessor",
        2_208_985_600,
    ),
    "Qwen2.5-VL-7B": (
        {
            **_QWEN,
            "model_type": "qwen2_5_vl",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 128000,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "vocab_size": 152064,
            "vision_config": {
                **_QWEN_VISION,
                "hidden_act": "silu",
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "out_hidden_size": 3584,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "tokens_per_second": 2,
            },
        },
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLProcessor",
        8_292_166_656,
    ),
    "LLaVA-1.5-7B": (
        {
            "model_type": "llava",
            "image_token_index": 32000,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "text_config": {
                "model_type": "llama",
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "vocab_size": 32064,
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "projection_dim": 768,
            },
        },
        "LlavaForConditionalGeneration",
        "LlavaProcessor",
        7_063_427_072,
    ),
}


def write_model(directory: Path, name: str) -> dict[str, Any]:
    """Write a config.json; gives back the lines of `model_classes`."""
    facts, model_class, processor_class, _ = MODELS[name]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**facts, "architectures": [model_class]}))
    return {"model_class": model_class, "processor_class": processor_class, "import_path": "transformers"}
