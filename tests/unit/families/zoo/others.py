"""Pixtral, Mistral 3, GLM-4V and Llama 3.2 Vision."""

from __future__ import annotations

from typing import Any

from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessor,
    MllamaProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
)

from tests.unit.families.zoo import templates
from tests.unit.families.zoo.parts import TEXT, byte_tokenizer, text_ids, token_id, with_random_weights

_MISTRAL_TOKENS = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")


def _mistral_tokenizer() -> Any:
    return byte_tokenizer(_MISTRAL_TOKENS, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _pixtral_vision() -> PixtralVisionConfig:
    return PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=8,
        image_size=112,
        patch_size=14,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def pixtral() -> tuple[Any, Any]:
    tokenizer = _mistral_tokenizer()
    processor: Any = PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}),
        tokenizer,
        patch_size=14,
        chat_template=templates.MISTRAL,
    )
    config = LlavaConfig(
        text_config=MistralConfig(**TEXT, **text_ids(tokenizer), sliding_window=None),
        vision_config=_pixtral_vision(),
        image_token_index=token_id(tokenizer, "[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return with_random_weights(LlavaForConditionalGeneration(config)), processor


def mistral3() -> tuple[Any, Any]:
    tokenizer = _mistral_tokenizer()
    processor: Any = PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 112}, patch_size=28),
        tokenizer,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=templates.MISTRAL,
    )
    config = Mistral3Config(
        text_config=MistralConfig(**TEXT, **text_ids(tokenizer), sliding_window=None),
        vision_config=_pixtral_vision(),
        image_token_index=token_id(tokenizer, "[IMG]"),
        spatial_merge_size=2,
    )
    return with_random_weights(Mistral3ForConditionalGeneration(config)), processor


def glm4v() -> tuple[Any, Any]:
    tokenizer = byte_tokenizer(
        (
            *("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
            *("<|begin_of_image|>", "<|image|>", "<|end_of_image|>"),
            *("<|begin_of_video|>", "<|video|>", "<|end_of_video|>"),
        ),
        eos_token="<|endoftext|>",
        pad_token="<pad>",
    )
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 64}
    processor: Any = Glm4vProcessor(
        image_processor=Glm4vImageProcessor(size=size),
        video_processor=Glm4vVideoProcessor(size=size),
        tokenizer=tokenizer,
        chat_template=templates.GLM4V,
    )
    config = Glm4vConfig(
        text_config={
            **TEXT,
            **text_ids(tokenizer),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
                "partial_rotary_factor": 1.0,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "image_size": 56,
        },
        image_token_id=token_id(tokenizer, "<|image|>"),
        video_token_id=token_id(tokenizer, "<|video|>"),
        image_start_token_id=token_id(tokenizer, "<|begin_of_image|>"),
        image_end_token_id=token_id(tokenizer, "<|end_of_image|>"),
        video_start_token_id=token_id(tokenizer, "<|begin_of_video|>"),
        video_end_token_id=token_id(tokenizer, "<|end_of_video|>"),
    )
    return with_random_weights(Glm4vForConditionalGeneration(config)), processor


def mllama() -> tuple[Any, Any]:
    tokenizer = byte_tokenizer(
        ("<|image|>", "<|python_tag|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<pad>",
    )
    processor: Any = MllamaProcessor(
        MllamaImageProcessor(size={"height": 28, "width": 28}, max_image_tiles=2),
        tokenizer,
        chat_template=templates.MLLAMA,
    )
    config = MllamaConfig(
        text_config={
            **{key: value for key, value in TEXT.items() if key != "head_dim"},
            **text_ids(tokenizer),
            "vocab_size": token_id(tokenizer, "<|image|>"),  # the image token has no logit
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "vision_output_dim": 64,
            "image_size": 28,
            "patch_size": 14,
            "max_num_tiles": 2,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        image_token_index=token_id(tokenizer, "<|image|>"),
    )
    return with_random_weights(MllamaForConditionalGeneration(config)), processor
