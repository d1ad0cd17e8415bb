"""The LLaVA families, and InternVL, which is built like them."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests.unit.families.zoo import templates
from tests.unit.families.zoo.parts import TEXT, VISION, byte_tokenizer, text_ids, token_id, with_random_weights

_SIDE = {"height": 28, "width": 28}
_PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def _llama_tokenizer() -> Any:
    return byte_tokenizer(("<image>", "<video>"), bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _chatml_tokenizer(*special: str, **named: str) -> Any:
    return byte_tokenizer(("<|im_start|>", *special), eos_token="<|im_end|>", pad_token="<|endoftext|>", **named)


def _clip(**changes: Any) -> CLIPVisionConfig:
    return CLIPVisionConfig(**VISION, projection_dim=32, **changes)


def llava() -> tuple[Any, Any]:
    """LLaVA-1.5: its checkpoints have no template of their own in old revisions; this one has none either."""
    tokenizer = _llama_tokenizer()
    processor: Any = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=_SIDE),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT, **text_ids(tokenizer)),
        vision_config=_clip(),
        image_token_index=token_id(tokenizer, "<image>"),
        image_seq_length=4,
    )
    return with_random_weights(LlavaForConditionalGeneration(config)), processor


def llava_next() -> tuple[Any, Any]:
    tokenizer = _llama_tokenizer()
    processor: Any = LlavaNextProcessor(
        LlavaNextImageProcessor(size={"shortest_edge": 28}, crop_size=_SIDE, image_grid_pinpoints=_PINPOINTS),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=templates.LLAVA_NEXT,
    )
    config = LlavaNextConfig(
        text_config=LlamaConfig(**TEXT, **text_ids(tokenizer)),
        vision_config=_clip(),
        image_token_index=token_id(tokenizer, "<image>"),
        image_grid_pinpoints=_PINPOINTS,
    )
    return with_random_weights(LlavaNextForConditionalGeneration(config)), processor


def llava_next_video() -> tuple[Any, Any]:
    tokenizer = _llama_tokenizer()
    processor: Any = LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(size={"shortest_edge": 28}, crop_size=_SIDE),
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 28}, crop_size=_SIDE, image_grid_pinpoints=_PINPOINTS
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=templates.LLAVA_NEXT_VIDEO,
    )
    config = LlavaNextVideoConfig(
        text_config=LlamaConfig(**TEXT, **text_ids(tokenizer)),
        vision_config=_clip(),
        image_token_index=token_id(tokenizer, "<image>"),
        video_token_index=token_id(tokenizer, "<video>"),
        image_grid_pinpoints=_PINPOINTS,
    )
    return with_random_weights(LlavaNextVideoForConditionalGeneration(config)), processor


def llava_onevision() -> tuple[Any, Any]:
    tokenizer = _chatml_tokenizer("<image>", "<video>")
    processor: Any = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=_SIDE, image_grid_pinpoints=_PINPOINTS),
        video_processor=LlavaOnevisionVideoProcessor(size=_SIDE),
        tokenizer=tokenizer,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        chat_template=templates.LLAVA_ONEVISION,
    )
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**TEXT, **text_ids(tokenizer)),
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        image_token_index=token_id(tokenizer, "<image>"),
        video_token_index=token_id(tokenizer, "<video>"),
        image_grid_pinpoints=_PINPOINTS,
    )
    return with_random_weights(LlavaOnevisionForConditionalGeneration(config)), processor


def internvl() -> tuple[Any, Any]:
    tokenizer = _chatml_tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    processor: Any = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=_SIDE, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=_SIDE),
        image_seq_length=1,
        chat_template=templates.INTERNVL,
    )
    config = InternVLConfig(
        text_config=Qwen2Config(**TEXT, **text_ids(tokenizer)),
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        image_token_id=token_id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=1,
        tie_word_embeddings=False,
    )
    return with_random_weights(InternVLForConditionalGeneration(config)), processor
