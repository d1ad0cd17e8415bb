"""Tiny random models of several families with their processors, for what only a forward can show."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from tests.unit.families import processors
from vlm_dist.demo.tiny_model import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    TinyShape,
    build_config,
    build_model,
    build_processor,
)

SHAPE = TinyShape(hidden_size=32, intermediate_size=64, num_layers=2, vision_dim=32, vision_depth=1)


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
    ids = {token: parts.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config=build_config(SHAPE, parts.tokenizer).text_config.to_dict() | {"model_type": "qwen2_5_vl_text"},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return _random(Qwen2_5_VLForConditionalGeneration(config)), processor


def llava() -> tuple[Any, Any]:
    processor = processors.llava()
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=len(processor.tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=28,
            patch_size=14,
        ),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    return _random(LlavaForConditionalGeneration(config)), processor


def _random(model: Any) -> Any:
    """Weights large enough for attention to matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(
                    0.0, 1.0 if "embed_tokens" in name else parameter[0].numel() ** -0.5, generator=generator
                )
    return model.eval()
