"""A Qwen2-VL of a few hundred thousand parameters: the real classes, the real checkpoint format, no download.

The demo fine-tunes it, the tests run on it. Weights are random, but embeddings are at unit scale and linears keep the
scale of what goes through: LoRA cannot change embeddings, head or patch convolution, so these must already tell tokens
and pictures apart, as those of a trained model do.

    from vlm_dist.demo.tiny_model import TinyShape, save_tiny_qwen2_vl
    save_tiny_qwen2_vl(Path("build/tiny"), TinyShape(hidden_size=32), seed=0)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

#: Qwen2-VL's own special tokens, in the order of their ids.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

#: Qwen2-VL's chat template (ChatML with vision markers), without its optional "Picture 1:" numbering.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

#: What the tokenizer learns its merges from, so that a prompt costs few tokens; anything else falls back to bytes.
DEFAULT_CORPUS = (
    "assistant",
    "system",
    "user",
    "You are a helpful assistant.",
    "Answer briefly. Answer with digits.",
    "Which digit is this?",
    "Which digits are shown, in order?",
    "zero one two three four five six seven eight nine",
    "What is in the image? What happens in the video? Describe this image. yes no",
)


#: Of the head's weights: logits get a standard deviation of HEAD_STD x sqrt(hidden_size), about 3, so that the largest
#: logit that LoRA can reach through the frozen head is well above the others.
HEAD_STD = 0.3


@dataclass(frozen=True)
class TinyShape:
    """Sizes of the tiny model; the defaults are the demo's."""

    hidden_size: int = 96
    intermediate_size: int = 192
    num_layers: int = 3
    num_heads: int = 4
    num_key_value_heads: int = 2
    vision_dim: int = 64
    vision_depth: int = 2
    vision_heads: int = 4
    patch_size_pixels: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 56 * 56
    max_position_embeddings: int = 4096


def build_tokenizer(corpus: Iterable[str] = DEFAULT_CORPUS, num_merges: int = 400) -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen's pre-tokeniser and special tokens; every string round-trips."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + num_merges, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(list(corpus), trainer)
    learned = json.loads(learner.to_str())["model"]  # vocab and merges have no public getter
    merges: Any = [tuple(merge) for merge in learned["merges"]]  # annotated as list[str], refused unless pairs
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=merges,
        extra_special_tokens=list(SPECIAL_TOKENS),
        eos_token="<|im_end|>",  # noqa: S106 - not a password
        pad_token="<|endoftext|>",  # noqa: S106
        model_max_length=4096,
    )


def build_processor(shape: TinyShape, tokenizer: Qwen2Tokenizer | None = None) -> Qwen2VLProcessor:
    """Qwen2-VL's processor with image and video processor at the tiny geometry."""
    pixels: dict[str, Any] = {"min_pixels": shape.min_pixels, "max_pixels": shape.max_pixels}
    geometry: dict[str, Any] = {
        "patch_size": shape.patch_size_pixels,
        "merge_size": shape.spatial_merge_size,
        "temporal_patch_size": shape.temporal_patch_size,
    }
    # where transformers has this switch, leaving it unset warns once per worker
    has_cap = hasattr(Qwen2VLVideoProcessor, "cap_pixels_per_frame")
    cap: dict[str, Any] = {"cap_pixels_per_frame": False} if has_cap else {}
    processor_class: Any = Qwen2VLProcessor  # its __init__ has no annotations
    processor: Qwen2VLProcessor = processor_class(
        image_processor=Qwen2VLImageProcessor(**pixels, **geometry),
        video_processor=Qwen2VLVideoProcessor(**pixels, **geometry, **cap),
        tokenizer=tokenizer or build_tokenizer(),
        chat_template=CHAT_TEMPLATE,
    )
    return processor


def build_config(shape: TinyShape, tokenizer: Qwen2Tokenizer) -> Qwen2VLConfig:
    """The tiny architecture; token ids come from the tokenizer."""
    ids: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    head_size = shape.hidden_size // shape.num_heads
    half = head_size // 2  # rotary frequencies, shared by time, height and width
    return Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_key_value_heads,
            "max_position_embeddings": shape.max_position_embeddings,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": shape.vision_depth,
            "embed_dim": shape.vision_dim,
            "hidden_size": shape.hidden_size,
            "num_heads": shape.vision_heads,
            "mlp_ratio": 2,
            "patch_size": shape.patch_size_pixels,
            "spatial_merge_size": shape.spatial_merge_size,
            "temporal_patch_size": shape.temporal_patch_size,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def build_model(config: Qwen2VLConfig, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """A random model in float32 whose activations keep unit scale through all layers."""
    model: Any = Qwen2VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, 1.0, generator=generator)
            elif isinstance(module, nn.Linear | nn.Conv3d):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0.0, 1.0 / math.sqrt(fan_in), generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
        model.get_output_embeddings().weight.normal_(0.0, HEAD_STD, generator=generator)
    text_config: Any = config.text_config
    model.generation_config.update(
        do_sample=False, eos_token_id=text_config.eos_token_id, pad_token_id=text_config.pad_token_id
    )
    built: Qwen2VLForConditionalGeneration = model.eval()
    return built


def save_tiny_qwen2_vl(
    directory: Path, shape: TinyShape | None = None, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write a random model, its processor and its tokenizer as `from_pretrained` reads them; returns the directory."""
    shape = shape or TinyShape()
    processor = build_processor(shape)
    save_checkpoint(directory, build_model(build_config(shape, processor.tokenizer), seed), processor, dtype)
    return directory


def save_checkpoint(
    directory: Path, model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, dtype: torch.dtype
) -> None:
    """Write a model directory; its weights are those of `model` in `dtype`, and so are `model`'s afterwards."""
    directory.mkdir(parents=True, exist_ok=True)
    nn.Module.to(model, dtype)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
