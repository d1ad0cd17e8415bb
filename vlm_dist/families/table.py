"""The table of families. A new family is a new row; nothing else asks for a model type."""

from __future__ import annotations

from dataclasses import replace

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

QWEN3_VL = replace(
    QWEN2_VL,
    name="qwen3_vl",
    model_types=("qwen3_vl",),
    min_frames=2,
)

GLM4V = Family(
    name="glm4v",
    model_types=("glm4v",),
    image_tokens=("<|image|>",),
    video_tokens=("<|video|>",),  # its frames become image tokens, so that the model cannot tell the two apart
    image_marker="<|begin_of_image|><|image|><|end_of_image|>",
    video_marker="<|begin_of_video|><|video|><|end_of_video|>",
    takes_video=True,
    needs_video_metadata=True,
    min_frames=2,
    frame_step=2,
    dummy_resize=False,
    packing="mrope",
    patches_per_token=4,
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

#: Pixtral is LLaVA's model class round another vision tower, with a processor of its own.
PIXTRAL = Family(
    name="pixtral",
    model_types=("llava",),
    processors=("PixtralProcessor",),
    image_tokens=("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    image_marker="[IMG]",
    dummy_side_pixels=56,
    packing="positions",
)

MISTRAL3 = replace(PIXTRAL, name="mistral3", model_types=("mistral3",), processors=(), patches_per_token=4)

LLAVA_NEXT = Family(
    name="llava_next",
    model_types=("llava_next",),
    image_tokens=("<image>",),
    image_marker="<image>",
    dummy_side_pixels=28,
    fallback_template=USER_ASSISTANT_TEMPLATE,
    packing="positions",
)

LLAVA_NEXT_VIDEO = replace(
    LLAVA_NEXT,
    name="llava_next_video",
    model_types=("llava_next_video",),
    video_tokens=("<video>",),
    video_marker="<video>",
    takes_video=True,
    takes_image_and_video=True,
    equal_frames=True,
)

LLAVA_ONEVISION = replace(
    LLAVA_NEXT_VIDEO,
    name="llava_onevision",
    model_types=("llava_onevision",),
    fallback_template=CHATML_TEMPLATE.replace("[image]", "<image>").replace("[video]", "<video>"),
)

INTERNVL = Family(
    name="internvl",
    model_types=("internvl", "internvl_chat"),
    image_tokens=("<IMG_CONTEXT>",),
    video_tokens=("<video>",),  # its frames become image tokens
    image_marker="<IMG_CONTEXT>",
    video_marker="<video>",
    takes_video=True,
    takes_image_and_video=True,
    needs_video_metadata=True,
    dummy_side_pixels=28,
    fallback_template=CHATML_TEMPLATE.replace("[image]", "<IMG_CONTEXT>\n").replace("[video]", "<video>\n"),
    packing="positions",
    patches_per_token=4,
)

IDEFICS2 = Family(
    name="idefics2",
    model_types=("idefics2",),
    image_tokens=("<image>",),
    image_marker="<image>",
    dummy_side_pixels=28,
    packing="positions",
)

IDEFICS3 = replace(IDEFICS2, name="idefics3", model_types=("idefics3",), patches_per_token=4)

SMOLVLM = replace(
    IDEFICS3,
    name="smolvlm",
    model_types=("smolvlm",),
    video_tokens=("<video>",),  # its frames become image tokens
    video_marker="<video>",
    takes_video=True,
    needs_video_metadata=True,
    patches_per_token=16,
)

GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3",),
    image_tokens=("<image_soft_token>", "<start_of_image>"),
    image_marker="<start_of_image>",
    follows_resolution=False,
    dummy_side_pixels=28,
    packing_refusal="the tokens of an image see each other in both directions, and some layers see a window alone",
    flash_refusal="the tokens of an image see each other in both directions, for which it has no mask",
    patches_per_token=16,
)

#: Phi-3-vision and Phi-3.5-vision, by the code in their repositories. A picture is enlarged to as many crops as the
#: processor may cut, so that its own size hardly matters.
PHI3_VISION = Family(
    name="phi3_v",
    model_types=("phi3_v",),
    image_tokens=("<|image_",),
    image_marker="<|image_{n}|>",
    negative_image_ids=True,
    follows_resolution=False,
    dummy_side_pixels=336,
    packing_refusal="their own code finds no borders of samples in a row",
    flash_refusal="their code asks for an interface of it that transformers has given up",
    patches_per_token=4,
)

MLLAMA = Family(
    name="mllama",
    model_types=("mllama",),
    refusal="their images come in through cross-attention, whose masks cannot be joined over samples with different "
    "numbers of images",
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
    flash_refusal="the tokens of a prompt see each other in both directions, for which it has no mask",
)

#: For a model type without a row: what most processors have in common, videos with priority over images.
GENERIC = Family(name="generic", takes_video=True, needs_video_metadata=True, dummy_side_pixels=56)

FAMILIES: tuple[Family, ...] = (
    QWEN2_VL,
    QWEN3_VL,
    GLM4V,
    MISTRAL3,
    PIXTRAL,
    LLAVA,
    LLAVA_NEXT,
    LLAVA_NEXT_VIDEO,
    LLAVA_ONEVISION,
    INTERNVL,
    PALIGEMMA,
    GEMMA3,
    IDEFICS2,
    IDEFICS3,
    SMOLVLM,
    PHI3_VISION,
    MLLAMA,
)


def family_for(model_type: str, processor: str | None = None) -> Family:
    """Find the row of a model.

    Args:
        model_type: of config.json.
        processor: name of the processor's class, where it is known.

    Returns:
        The row; the generic one where there is none.
    """
    rows = [family for family in FAMILIES if model_type in family.model_types]
    special = [family for family in rows if processor in family.processors]
    return next(iter(special or [family for family in rows if not family.processors]), GENERIC)
