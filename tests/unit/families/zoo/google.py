"""PaliGemma and Gemma 3."""

from __future__ import annotations

from typing import Any

from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessor,
)

from tests.unit.families.zoo import templates
from tests.unit.families.zoo.parts import TEXT, VISION, byte_tokenizer, text_ids, token_id, with_random_weights

_SIDE = {"height": 28, "width": 28}


def paligemma() -> tuple[Any, Any]:
    """Has no chat template, as published."""
    tokenizer = byte_tokenizer(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    image_processor = SiglipImageProcessor(size=_SIDE)
    image_processor.image_seq_length = 4
    processor: Any = PaliGemmaProcessor(image_processor, tokenizer)
    config = PaliGemmaConfig(
        text_config={**TEXT, **text_ids(tokenizer), "model_type": "gemma"},
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=token_id(tokenizer, "<image>"),
        projection_dim=32,
        pad_token_id=tokenizer.pad_token_id,
    )
    return with_random_weights(PaliGemmaForConditionalGeneration(config)), processor


def gemma3() -> tuple[Any, Any]:
    tokenizer = byte_tokenizer(
        ("<start_of_turn>", "<end_of_turn>"),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    processor: Any = Gemma3Processor(
        Gemma3ImageProcessor(size=_SIDE), tokenizer, chat_template=templates.GEMMA3, image_seq_length=4
    )
    config = Gemma3Config(
        text_config={**TEXT, **text_ids(tokenizer), "sliding_window": 16, "query_pre_attn_scalar": 8},
        vision_config={**VISION, "image_size": 28, "patch_size": 7, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    return with_random_weights(Gemma3ForConditionalGeneration(config)), processor
