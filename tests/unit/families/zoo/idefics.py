"""Idefics2, Idefics3 and SmolVLM."""

from __future__ import annotations

from typing import Any

from transformers import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessor,
    Idefics2Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tests.unit.families.zoo import templates
from tests.unit.families.zoo.parts import TEXT, VISION, byte_tokenizer, text_ids, token_id, with_random_weights

_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<|im_start|>")
_GRID = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
_SIZES: dict[str, Any] = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
_TOWER = {**VISION, "image_size": 56}  # 4 x 4 patches, of which 2 x 2 become one token


def _tokenizer(*special: str) -> Any:
    return byte_tokenizer(
        (*_TOKENS, *_GRID, *special),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def idefics2() -> tuple[Any, Any]:
    tokenizer = _tokenizer()
    processor: Any = Idefics2Processor(
        Idefics2ImageProcessor(size={"shortest_edge": 28, "longest_edge": 56}, do_image_splitting=False),
        tokenizer,
        image_seq_len=4,
        chat_template=templates.IDEFICS,
    )
    config = Idefics2Config(
        text_config={**TEXT, **text_ids(tokenizer), "model_type": "mistral", "sliding_window": None},
        vision_config=_TOWER,
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        image_token_id=token_id(tokenizer, "<image>"),
    )
    return with_random_weights(Idefics2ForConditionalGeneration(config)), processor


def idefics3() -> tuple[Any, Any]:
    tokenizer = _tokenizer()
    processor: Any = Idefics3Processor(
        Idefics3ImageProcessor(**_SIZES), tokenizer, image_seq_len=4, chat_template=templates.IDEFICS
    )
    config = Idefics3Config(
        text_config={**TEXT, **text_ids(tokenizer), "model_type": "llama"},
        vision_config=_TOWER,
        image_token_id=token_id(tokenizer, "<image>"),
        scale_factor=2,
    )
    return with_random_weights(Idefics3ForConditionalGeneration(config)), processor


def smolvlm() -> tuple[Any, Any]:
    tokenizer = _tokenizer("<video>")
    processor: Any = SmolVLMProcessor(
        SmolVLMImageProcessor(**_SIZES),
        tokenizer,
        SmolVLMVideoProcessor(
            size={"longest_edge": 56}, max_image_size={"longest_edge": 56}, video_sampling={"fps": 1, "max_frames": 8}
        ),
        image_seq_len=4,
        chat_template=templates.IDEFICS,
    )
    config = SmolVLMConfig(
        text_config={**TEXT, **text_ids(tokenizer), "model_type": "llama"},
        vision_config=_TOWER,
        image_token_id=token_id(tokenizer, "<image>"),
        scale_factor=2,
    )
    return with_random_weights(SmolVLMForConditionalGeneration(config)), processor
