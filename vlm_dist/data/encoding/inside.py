"""What a sample was on its way into a micro-batch: kept only for whoever wants to look at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vlm_dist.data.encoding.conversation import Conversation
from vlm_dist.data.encoding.fitted import Fitted
from vlm_dist.data.encoding.labels import RenderedText
from vlm_dist.data.media.images import Picture
from vlm_dist.data.media.video import Clip
from vlm_dist.data.types import RawSample, SampleOrigin, SampleRef


@dataclass(frozen=True, slots=True)
class SampleInside:
    """One sample of a micro-batch. t tokens of its own.

    Attributes:
        origin: where it comes from.
        ref: its row.
        text: of the conversation, before the processor expands its placeholders.
        image_files: its images as they were read.
        video_files: its videos as they were read.
        images: the pictures that the processor got.
        clips: the clips that the processor got.
        visual: the tensors that it made of them.
        answers: bool [t], tokens of the answers with their terminators.
        is_visual: bool [t], tokens in the place of media.
        was_reduced: its media were made smaller to fit `max_length`.
        was_cut: its text was cut at `max_length`.
        row: of the micro-batch's `input_ids` that has it.
        start: its first token in that row.
    """

    origin: SampleOrigin
    ref: SampleRef
    text: str
    image_files: Sequence[bytes]
    video_files: Sequence[bytes]
    images: Sequence[Picture]
    clips: Sequence[Clip]
    visual: dict[str, Tensor]
    answers: Tensor
    is_visual: Tensor
    was_reduced: bool
    was_cut: bool
    row: int = 0
    start: int = 0

    @classmethod
    def of(
        cls, raw: RawSample, ref: SampleRef, conversation: Conversation, rendered: RenderedText, fitted: Fitted
    ) -> SampleInside:
        """Keep what there is of a sample when it has been encoded."""
        return cls(
            origin=raw.origin,
            ref=ref,
            text=rendered.text,
            image_files=conversation.images,
            video_files=conversation.videos,
            images=fitted.images,
            clips=fitted.clips,
            visual=fitted.encoded.visual,
            answers=fitted.encoded.answers,
            is_visual=fitted.encoded.is_visual,
            was_reduced=fitted.was_reduced,
            was_cut=fitted.was_cut,
        )
