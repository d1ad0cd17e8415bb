"""Qwen's families."""

from __future__ import annotations

from typing import Any

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.unit.families.zoo.parts import TEXT, text_ids, with_random_weights
from vlm_dist.demo.tiny_model import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    TinyShape,
    build_config,
    build_model,
    build_processor,
)

SHAPE = TinyShape(
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    vision_dim=32,
    vision_depth=1,
    min_pixels=28 * 28 * 4,
    max_pixels=28 * 28 * 16,
)
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def _ids(tokenizer: Any) -> dict[str, Any]:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def qwen2_vl() -> tuple[Any, Any]:
    processor = build_processor(SHAPE)
    return build_model(build_config(SHAPE, processor.tokenizer)), processor


def qwen2_5_vl() -> tuple[Any, Any]:
    parts = build_processor(SHAPE)
    processor: Any = Qwen2_5_VLProcessor(
        image_processor=parts.image_processor,
        video_processor=parts.video_processor,
        tokenizer=parts.tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    config = Qwen2_5_VLConfig(
        text_config=build_config(SHAPE, parts.tokenizer).text_config.to_dict() | {"model_type": "qwen2_5_vl_text"},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        **_ids(parts.tokenizer),
    )
    return with_random_weights(Qwen2_5_VLForConditionalGeneration(config)), processor


def qwen3_vl() -> tuple[Any, Any]:
    tokenizer = build_processor(SHAPE).tokenizer
    geometry: dict[str, Any] = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 16}
    processor: Any = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, **geometry),
        video_processor=Qwen3VLVideoProcessor(size={**size, "longest_edge": 32 * 32 * 64}, **geometry),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    config = Qwen3VLConfig(
        # a layer more than there are deepstack features: what is added behind the last one reaches no answer
        text_config={**TEXT, **text_ids(tokenizer), "num_hidden_layers": 3, "rope_parameters": _MROPE},
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **_ids(tokenizer),
    )
    return with_random_weights(Qwen3VLForConditionalGeneration(config)), processor
