"""Encodes a sample so that it fits `max_length`, or foretells what that will come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_dist.config.vlm_collator import VlmCollatorConfig
from vlm_dist.data.encoding.encode import Encoded, Encoder, TextLength
from vlm_dist.data.encoding.fit import Fitter, MediaSizes
from vlm_dist.data.encoding.labels import RenderedText
from vlm_dist.data.media.images import Picture
from vlm_dist.data.media.video import Clip
from vlm_dist.errors import SkipSample

_MAX_REFITS = 4


@dataclass(frozen=True, slots=True)
class Fitted:
    """A sample that fits.

    Attributes:
        encoded: the sample.
        images: its pictures, in the form that fits.
        clips: its videos, the same.
        was_reduced: its media were made smaller.
        was_cut: its text was cut.
    """

    encoded: Encoded
    images: Sequence[Picture] = ()
    clips: Sequence[Clip] = ()
    was_reduced: bool = False
    was_cut: bool = False


@dataclass(frozen=True, slots=True)
class SampleLength:
    """How long a sample is, when it has been made to fit.

    Attributes:
        num_tokens: text and visual.
        num_visual_tokens: of them.
        was_reduced: its media are made smaller.
        was_cut: its text is cut.
    """

    num_tokens: int
    num_visual_tokens: int
    was_reduced: bool = False
    was_cut: bool = False


class FittingEncoder:
    """Makes samples fit.

    First the media are made smaller until the whole text fits beside them. Where the text alone is too long for that,
    its end is cut, and the media take up to half of `max_length`.

    Args:
        encoder: calls the processor.
        fitter: makes media smaller.
        config: has `max_length` and `truncation`.
        for_generation: prompts are never cut.
    """

    def __init__(self, encoder: Encoder, fitter: Fitter, config: VlmCollatorConfig, for_generation: bool) -> None:
        self._encoder = encoder
        self._fitter = fitter
        self._max_length = config.text_processing.max_length
        self._may_truncate = config.text_processing.truncation
        self._learns_answers_alone = config.label_masking.mask_input_tokens
        self._for_generation = for_generation

    def encode(
        self, rendered: RenderedText, images: Sequence[Picture], clips: Sequence[Clip], answer: str | None
    ) -> Fitted:
        """Encode a sample.

        Raises:
            SkipSample: ("too_long") its smallest form does not fit, or `truncation` is off.
        """
        limit = self._max_length
        if not self._may_truncate:
            encoded = self._encoder.encode(rendered, images, clips, answer=answer)
            self._refuse_above_limit(encoded.num_tokens)
            return Fitted(encoded, images, clips)
        sizes = MediaSizes.of(images, clips)
        if answer is None and len(rendered.text.encode()) + self._fitter.count(sizes) <= limit:
            # a token is at least a byte: it fits, and its text need not be tokenised apart from its media first
            encoded = self._encoder.encode(rendered, images, clips)
            if encoded.num_tokens <= limit:
                return Fitted(encoded, images, clips)
        budget, must_cut = self._visual_budget(self._encoder.measure_text(rendered, answer), sizes)
        was_reduced = False
        for _ in range(_MAX_REFITS):
            if self._fitter.count(sizes) > budget:
                reduction = self._fitter.shrink(sizes, budget)
                if reduction is None:
                    break
                images, clips = reduction.of_media(images, clips)
                sizes = MediaSizes.of(images, clips)
                was_reduced = True
            encoded = self._encoder.encode(rendered, images, clips, answer=answer)
            num_over = encoded.num_tokens - limit
            if num_over <= 0:
                return Fitted(encoded, images, clips, was_reduced)
            if must_cut and encoded.num_kept < limit:
                return Fitted(encoded.cut(limit), images, clips, was_reduced, was_cut=True)
            budget = self._fitter.count(sizes) - num_over  # the prediction was too low by so much
        raise SkipSample("too_long", f"max_length {limit} has no room for the media in their smallest form")

    def foretell(self, rendered: RenderedText, sizes: MediaSizes) -> SampleLength | None:
        """Say how long a sample will be, from its text and the sizes of its media.

        Returns:
            The same that `encode` comes to; None where that cannot be known without it.

        Raises:
            SkipSample: ("too_long") as `encode`.
        """
        if not sizes.kinds <= self._fitter.counter.additive:
            return None
        text = self._encoder.measure_text(rendered)
        visual = self._fitter.count(sizes)
        if not self._may_truncate:
            self._refuse_above_limit(text.num_tokens + visual)
            return SampleLength(text.num_tokens + visual, visual)
        budget, must_cut = self._visual_budget(text, sizes)
        was_reduced = visual > budget
        if was_reduced:
            reduction = self._fitter.shrink(sizes, budget)
            if reduction is None:
                raise SkipSample("too_long", f"max_length {self._max_length} has no room for the media")
            visual = self._fitter.count(reduction.of_sizes(sizes))
        if text.num_tokens + visual <= self._max_length:
            return SampleLength(text.num_tokens + visual, visual, was_reduced)
        if must_cut and text.num_before_visual_end + visual < self._max_length:
            return SampleLength(self._max_length, visual, was_reduced, was_cut=True)
        return None

    def _refuse_above_limit(self, num_tokens: int) -> None:
        if num_tokens > self._max_length:
            message = f"{num_tokens} tokens, max_length is {self._max_length} and truncation is off"
            raise SkipSample("too_long", message)

    def _visual_budget(self, text: TextLength, sizes: MediaSizes) -> tuple[int, bool]:
        """Decide how many visual tokens a sample may have, and whether its text has to be cut."""
        limit = self._max_length
        room_beside_text = limit - text.num_tokens
        if self._fitter.count(sizes) <= room_beside_text:
            return room_beside_text, False
        smallest = self._fitter.smallest(sizes)
        if smallest <= room_beside_text:
            return room_beside_text, False
        needed = text.num_before_answer if self._learns_answers_alone else text.num_before_visual_end
        room = limit - needed - 1
        if self._for_generation or room < smallest:
            why = ": nothing of the answer would be left" if self._learns_answers_alone else ""
            raise SkipSample(
                "too_long",
                f"{text.num_tokens} tokens of text and at least {smallest} of media, max_length is {limit}{why}",
            )
        return max(smallest, min(limit // 2, room)), True
