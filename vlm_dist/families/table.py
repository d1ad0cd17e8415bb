"""The table of families. A new family is a new row; nothing else asks for a model type."""

from __future__ import annotations

from vlm_dist.families.family import Family
from vlm_dist.families.templates import CHATML_TEMPLATE, PLAIN_TEMPLATE, USER_ASSISTANT_TEMPLATE

QWEN2_VL = Family(
    name="qwen2_vl",
    model_types=("qwen2_vl", "qwen2_5_vl"),
    image_tokens=("<|image_pad|>",),
    video_tokens=("<|video_pad|>",),
    image_marker="<|vision_start|><|image_pad|><|vision_end|>",
    video_marker="<|vision_start|><|video_pad|><|vision_end|>",
    takes_video=True,
    takes_image_and_video=True,
    needs_video_metadata=True,  # without it Qwen2.5-VL takes every clip for 24 frames per second
    frame_step=2,
    dummy_resize=False,
    fallback_template=CHATML_TEMPLATE.replace("[image]", "<|vision_start|><|image_pad|><|vision_end|>").replace(
        "[video]", "<|vision_start|><|video_pad|><|vision_end|>"
    ),
    packing="mrope",
    patches_per_token=4,  # 2 x 2 patches are merged
)

LLAVA = Family(
    name="llava",
    model_types=("llava",),
    image_tokens=("<image>",),
    image_marker="<image>",
    follows_resolution=False,
    dummy_side_pixels=28,
    fallback_template=USER_ASSISTANT_TEMPLATE,
    packing="positions",
)

PALIGEMMA = Family(
    name="paligemma",
    model_types=("paligemma",),
    image_tokens=("<image>",),
    image_marker="<image>",
    follows_resolution=False,
    dummy_side_pixels=28,
    answer_argument="suffix",
    processor_needs_image=True,
    fallback_template=PLAIN_TEMPLATE,
    packing_refusal="the tokens of a prompt see each other in both directions, over the borders of samples",
)

#: For a model type without a row: what most processors have in common, videos with priority over images.
GENERIC = Family(name="generic", takes_video=True, needs_video_metadata=True, dummy_side_pixels=56)

FAMILIES: tuple[Family, ...] = (QWEN2_VL, LLAVA, PALIGEMMA)


def family_for(model_type: str) -> Family:
    """Find the row of a `model_type` of config.json; the generic row where there is none."""
    return next((family for family in FAMILIES if model_type in family.model_types), GENERIC)
