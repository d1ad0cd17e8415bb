"""One row of the table: the facts about a model family that the data room needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

#: Pad value per key with one entry per token, for every family. `input_ids` is padded with the tokenizer's own pad
#: token; what is not listed here is a visual tensor.
TOKEN_PAD_VALUES: Mapping[str, int] = {"attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0}


@dataclass(frozen=True)
class Family:
    """How samples of one model family are rendered, expanded, fitted and merged.

    Attributes:
        name: of the row.
        model_types: values of `model_type` in config.json that it covers.
        processors: names of processor classes; where there are any, only models with one of these are covered, and the
            row goes before rows without: the same model class may stand behind different processors.
        image_tokens: the tokens (or beginnings of numbered markers) that stand for an image, in the text and once the
            processor has expanded it.
        video_tokens: the same for videos.
        image_marker: what the model's text has in the place of one image, before the expansion, with `{n}` for its
            number in the sample, from 1; None: the processor's `image_token`.
        video_marker: the same for one video.
        takes_video: whether the processor takes videos.
        takes_image_and_video: whether one model input may have both; else videos have priority.
        needs_video_metadata: whether times of frames go to the processor.
        min_frames: a shorter clip repeats its last frame up to this.
        frame_step: frames are reduced in steps of this, since the model joins so many.
        follows_resolution: whether a smaller picture costs fewer tokens.
        dummy_side_pixels: side of the square dummy picture; None: one merged patch, where the processor tells.
        dummy_resize: False keeps the processor from enlarging the dummy to its min_pixels.
        pad_values: key with one entry per token -> value of padding.
        answer_argument: the processor's argument for the answer, where it is no part of the text; its token_type_ids
            then mark the answer.
        processor_needs_image: text-only samples go to the tokenizer instead.
        negative_image_ids: image tokens are ids below 0, which cannot be labels.
        fallback_template: chat template (Jinja) for processors that have none.
        packing: how samples that share one row are told apart: "positions" restart at each sample; "mrope" besides
            asks the model itself to number the tokens of its images and videos; None: they cannot be.
        packing_refusal: why not, where `packing` is None; the end of a sentence about the family's models.
        flash_refusal: why flash attention computes something else; the end of a sentence.
        patches_per_token: patches of the vision tower behind one visual token.
        equal_frames: the clips of one micro-batch must have the same number of frames.
        refusal: why models of this family cannot be trained at all; the end of a sentence about them.
    """

    name: str
    model_types: tuple[str, ...] = ()
    processors: tuple[str, ...] = ()
    image_tokens: tuple[str, ...] = ()
    video_tokens: tuple[str, ...] = ()
    image_marker: str | None = None
    video_marker: str | None = None
    takes_video: bool = False
    takes_image_and_video: bool = False
    needs_video_metadata: bool = False
    min_frames: int = 1
    frame_step: int = 1
    follows_resolution: bool = True
    dummy_side_pixels: int | None = None
    dummy_resize: bool = True
    pad_values: Mapping[str, int] = field(default_factory=lambda: dict(TOKEN_PAD_VALUES))
    answer_argument: Literal["suffix"] | None = None
    processor_needs_image: bool = False
    negative_image_ids: bool = False
    fallback_template: str | None = None
    packing: Literal["positions", "mrope"] | None = None
    packing_refusal: str = "nobody has proven yet that they keep packed samples apart"
    flash_refusal: str | None = None
    patches_per_token: int = 1
    equal_frames: bool = False
    refusal: str | None = None
