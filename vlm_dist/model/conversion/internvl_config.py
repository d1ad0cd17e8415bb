"""The native configuration of an InternVLChatModel, from its config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlm_dist.errors import ModelError

#: Language model's class -> the native configuration's class.
_TEXT_CONFIGS = {
    "InternLM2ForCausalLM": "LlamaConfig",  # but for the layout of its weights it is one
    "LlamaForCausalLM": "LlamaConfig",
    "Qwen2ForCausalLM": "Qwen2Config",
    "Phi3ForCausalLM": "Phi3Config",
}
#: What the original classes assume where config.json is silent, as far as the native ones assume something else.
_VISION_DEFAULTS: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 14,
    "hidden_size": 3200,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "num_hidden_layers": 48,
    "norm_type": "rms_norm",
    "qkv_bias": False,
    "qk_normalization": True,
}
_INTERNLM2_DEFAULTS: dict[str, Any] = {"vocab_size": 103168, "pad_token_id": 0, "bias": True, "rope_theta": 10000}
#: Of a config.json of any model; they say nothing about the architecture.
_NOT_ARCHITECTURE = {
    "architectures",
    "model_type",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "id2label",
    "label2id",
}


@dataclass(frozen=True)
class TileRules:
    """How a picture is cut into tiles.

    Attributes:
        side_pixels: of a tile.
        min_tiles: a picture has at least so many.
        max_tiles: and at most so many, without the thumbnail.
        num_tokens: of a tile.
    """

    side_pixels: int
    min_tiles: int
    max_tiles: int
    num_tokens: int


def language_class(config: Mapping[str, Any]) -> str:
    """Class of the language model.

    Raises:
        ModelError: it has no native successor.
    """
    names = config.get("llm_config", {}).get("architectures") or [None]
    if names[0] not in _TEXT_CONFIGS:
        raise ModelError(
            f"its language model {names[0]} has no equal in transformers ({', '.join(_TEXT_CONFIGS)} have one). Use a "
            "checkpoint in transformers' own format, such as OpenGVLab/InternVL3-2B-hf, with model_class "
            "InternVLForConditionalGeneration and processor_class InternVLProcessor."
        )
    return str(names[0])


def native_config(config: Mapping[str, Any], image_token_id: int) -> Any:
    """The `InternVLConfig` of an original config.json.

    Raises:
        ModelError: the model does something that the native one cannot.
    """
    from transformers import InternVLConfig, InternVLVisionConfig

    if config.get("ps_version", "v1") != "v2":
        raise ModelError(
            f"its ps_version is {config.get('ps_version', 'v1')}, which turns images; the native model knows only v2"
        )
    vision = _VISION_DEFAULTS | config.get("vision_config", {})
    language = config.get("llm_config", {})
    text_config = _text_config(language, language_class(config))
    vision_config = InternVLVisionConfig(
        **{key: vision[key] for key in _shared_keys(InternVLVisionConfig, vision)},
        use_qk_norm=vision["qk_normalization"],
        attention_bias=vision["qkv_bias"],
        projection_dropout=vision.get("dropout", 0.0),
        use_absolute_position_embeddings=True,
        use_mean_pooling=True,  # so that no norm follows the last layer
    )
    rules = tile_rules(config)
    return InternVLConfig(
        architectures=["InternVLForConditionalGeneration"],
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=image_token_id,
        image_seq_length=rules.num_tokens,
        downsample_ratio=config.get("downsample_ratio", 0.5),
        vision_feature_layer=config.get("select_layer", -1),
        tie_word_embeddings=bool(language.get("tie_word_embeddings", False)),
        dtype=str(config.get("torch_dtype", "bfloat16")),
    )


def tile_rules(config: Mapping[str, Any]) -> TileRules:
    """How the original cuts a picture.

    Raises:
        ModelError: the native processor cannot do it.
    """
    vision = _VISION_DEFAULTS | config.get("vision_config", {})
    side = config.get("force_image_size") or vision["image_size"]
    is_dynamic = bool(config.get("dynamic_image_size", False))
    max_tiles = int(config.get("max_dynamic_patch", 6)) if is_dynamic else 1
    if max_tiles > 1 and not config.get("use_thumbnail", False):
        raise ModelError("it cuts pictures into tiles without a thumbnail, but the native processor always adds one")
    tokens = int((side // vision["patch_size"]) ** 2 * config.get("downsample_ratio", 0.5) ** 2)
    return TileRules(side, int(config.get("min_dynamic_patch", 1)) if is_dynamic else 1, max_tiles, tokens)


def _text_config(language: Mapping[str, Any], name: str) -> Any:
    import transformers

    kind = getattr(transformers, _TEXT_CONFIGS[name])
    if name == "InternLM2ForCausalLM":
        language = {**_INTERNLM2_DEFAULTS, **language}
    values = {key: language[key] for key in _shared_keys(kind, language)}
    values["rope_parameters"] = _rope(language)
    if name == "InternLM2ForCausalLM":
        values["attention_bias"] = bool(language["bias"])
    if kind.model_type == "phi3" and "original_max_position_embeddings" in language:
        values["original_max_position_embeddings"] = language["original_max_position_embeddings"]
    return kind(**values)


def _rope(language: Mapping[str, Any]) -> dict[str, Any]:
    scaling = dict(language.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if kind in ("su", "yarn") and "long_factor" in scaling:  # older names of one and the same
        kind = "longrope"
    return {**scaling, "rope_type": kind, "rope_theta": float(language.get("rope_theta", 10000.0))}


def _shared_keys(kind: type[Any], values: Mapping[str, Any]) -> list[str]:
    known = {field.name for field in dataclasses.fields(kind)} - _NOT_ARCHITECTURE
    return [key for key in values if key in known and values[key] is not None]
