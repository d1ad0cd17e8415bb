"""Makes one micro-batch of the plan: reads, decodes, renders, encodes and collates its samples.

Stateless: the same job gives the same micro-batch, bit for bit, in any process and on any rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from vlm_dist.config.vlm_collator import VlmCollatorConfig
from vlm_dist.data.encoding.collate import Example, Padding, collate
from vlm_dist.data.encoding.dummies import DummyRows
from vlm_dist.data.encoding.encode import Encoded, Encoder, TextLength
from vlm_dist.data.encoding.fit import Fitter, VisualCounter
from vlm_dist.data.encoding.labels import RenderedText, Renderer, make_labels
from vlm_dist.data.encoding.preconditions import (
    check_columns,
    check_labels,
    choose_kinds,
    choose_pad_token,
    find_markers,
)
from vlm_dist.data.encoding.template import Media, MessageBuilder
from vlm_dist.data.media.images import decode_image
from vlm_dist.data.media.video import Clip, decode_video, repeat_last_frame
from vlm_dist.data.types import IGNORE_INDEX, MicroBatch, MicroBatchJob, NullSlot, SampleOrigin, SampleRef, Source
from vlm_dist.errors import ModelError, SkipSample
from vlm_dist.families import Family

_MAX_REFITS = 4


@dataclass(slots=True)
class _Sample:
    """One sample that is ready to be collated."""

    example: Example
    origin: SampleOrigin
    reference: str = ""
    was_reduced: bool = False
    was_cut: bool = False


class Materialiser:
    """Turns jobs into micro-batches; never raises for the sake of one sample. Picklable.

    A sample that cannot be used leaves an empty slot. Where after decoding nothing of a kind in `towers` is left, one
    dummy row per kind is added behind the samples: all ranks must call the same towers. A micro-batch without samples
    is the smallest text plus these dummies. Nothing of a dummy carries loss or is counted as a token of the data.

    Args:
        sources: the data; a `SampleRef.source` is a position in it.
        processor: of the model.
        family: its row in the table.
        collator_config: from columns to labels.
        towers: kinds of media, of "image" and "video", that every micro-batch must have.
        seed: of the run, for processors that draw random numbers.
        for_generation: prompts without the last answer, padded on the left; the answers are `references`, labels are
            all ignored.

    Raises:
        ConfigError: the configuration does not fit the data or the family.
        ModelError: the processor cannot do what is asked.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        processor: Any,
        family: Family,
        collator_config: VlmCollatorConfig,
        towers: frozenset[str],
        seed: int,
        for_generation: bool = False,
    ) -> None:
        self._sources = list(sources)
        self._family = family
        self._config = collator_config
        self._seed = seed
        self._for_generation = for_generation
        kinds = choose_kinds(collator_config, family)
        self._builder = MessageBuilder(collator_config.dataset_columns.mapping, collator_config.message_format, kinds)
        check_columns(self._builder, self._sources)
        check_labels(collator_config, family)
        self._renderer = Renderer(processor, family)
        self._encoder = Encoder(processor, family)
        if collator_config.label_masking.mask_input_tokens and not self._encoder.finds_answers:
            raise ModelError(
                f"label_masking.mask_input_tokens is true, but {type(processor).__name__} does not tell which "
                "characters a token comes from, so that answers cannot be told from prompts; "
                "set it to false, or use a fast tokenizer"
            )
        self._padding = Padding(
            token_id=choose_pad_token(self._encoder.tokenizer),
            side="left" if for_generation else "right",
            enabled=collator_config.text_processing.padding,
            carries_loss=not (collator_config.label_masking.mask_pad_token or for_generation),
        )
        markers = find_markers(kinds, processor, family)
        wanted = [kind for kind in sorted(kinds) if kind in towers]
        self._dummies = DummyRows(self._encoder, family, markers, wanted)
        self._fitter = Fitter(VisualCounter(self._encoder, processor, markers), family)

    def __call__(self, job: MicroBatchJob) -> MicroBatch:
        """Make one micro-batch.

        Raises:
            DataError: the storage fails; no single sample is to blame.
        """
        samples: list[_Sample] = []
        null_slots: list[NullSlot] = []
        for ref in job.refs:
            if ref is None:
                null_slots.append(NullSlot(None, "tail", "the epoch has no more samples"))
                continue
            try:
                samples.append(self._materialise(ref, job.step))
            except SkipSample as skip:
                origin = self._sources[ref.source].origin(ref.index)
                null_slots.append(NullSlot(origin, skip.null_class, skip.message))
        examples = [sample.example for sample in samples]
        examples += self._dummies.missing(examples)
        inputs, labels = collate(examples, self._family, self._padding)
        return MicroBatch(
            job=job,
            inputs=inputs,
            labels=labels.masked_fill(labels == IGNORE_INDEX, self._config.label_masking.ignore_index),
            num_samples=len(samples),
            num_target_tokens=int((labels != IGNORE_INDEX).sum()),
            num_tokens=sum(sample.example.labels.shape[0] for sample in samples),
            num_computed_tokens=labels.numel(),
            null_slots=null_slots,
            origins=[sample.origin for sample in samples],
            references=[sample.reference for sample in samples] if self._for_generation else [],
            num_reduced=sum(sample.was_reduced for sample in samples),
            num_cut=sum(sample.was_cut for sample in samples),
        )

    def name_samples(self, job: MicroBatchJob) -> list[str]:
        """Name a job's samples, for messages."""
        return [str(self._sources[ref.source].origin(ref.index)) for ref in job.refs if ref is not None]

    def _materialise(self, ref: SampleRef, step: int) -> _Sample:
        raw = self._sources[ref.source].read(ref.index)
        conversation = self._builder.build(raw.fields)
        reference = ""
        answer: str | None = None
        if self._for_generation or self._family.answer_argument is not None:
            conversation, reference = conversation.prompt()
            answer = None if self._for_generation else reference
        wants_answer = self._for_generation or self._config.text_processing.add_generation_prompt
        rendered = self._renderer.render(conversation.messages, add_generation_prompt=wants_answer)
        images = [self._decode_image(image) for image in conversation.images]
        clips = [self._decode_video(video) for video in conversation.videos]
        with _seeded(self._seed, step, ref):
            encoded, was_reduced, was_cut = self._encode(rendered, images, clips, answer)
        if self._for_generation:
            labels = torch.full_like(encoded.tokens["input_ids"], IGNORE_INDEX)
        else:
            labels = make_labels(
                encoded.tokens["input_ids"], encoded.answers, encoded.is_visual, self._config.label_masking
            )
            if was_cut and not (labels != IGNORE_INDEX).any():
                raise SkipSample("too_long", "nothing of the answer is within max_length")
        kinds = frozenset(kind for kind, items in (("image", images), ("video", clips)) if items)
        example = Example(encoded.tokens, encoded.visual, labels, kinds)
        return _Sample(example, raw.origin, reference, was_reduced, was_cut)

    def _decode_image(self, media: Media) -> Image.Image:
        settings = self._config.image_processing
        return decode_image(
            media,
            convert_to_rgb=settings.convert_to_rgb,
            resize_mode=settings.resize_mode,
            max_size=settings.max_size,
        )

    def _decode_video(self, media: Media) -> Clip:
        settings = self._config.video_processing
        clip = decode_video(
            media,
            num_frames=settings.frame_extraction.num_frames,
            max_duration=settings.file_processing.max_duration,
        )
        return repeat_last_frame(clip, self._family.min_frames)

    def _encode(
        self, rendered: RenderedText, images: list[Image.Image], clips: list[Clip], answer: str | None
    ) -> tuple[Encoded, bool, bool]:
        """Encode a sample so that it fits `max_length`.

        First the media are made smaller until the whole text fits beside them. Where the text alone is too long for
        that, its end is cut, and the media take up to half of `max_length`.

        Returns:
            The sample, whether its media were made smaller, whether its text was cut.

        Raises:
            SkipSample: ("too_long") its smallest form does not fit, or `truncation` is off.
        """
        limit = self._config.text_processing.max_length
        if not self._config.text_processing.truncation:
            encoded = self._encoder.encode(rendered, images, clips, answer=answer)
            if encoded.num_tokens > limit:
                message = f"{encoded.num_tokens} tokens, max_length is {limit} and truncation is off"
                raise SkipSample("too_long", message)
            return encoded, False, False
        budget, must_cut = self._visual_budget(self._encoder.measure_text(rendered, answer), images, clips)
        was_reduced = False
        for _ in range(_MAX_REFITS):
            if self._fitter.count(images, clips) > budget:
                smaller = self._fitter.shrink(images, clips, budget)
                if smaller is None:
                    break
                images, clips = smaller
                was_reduced = True
            encoded = self._encoder.encode(rendered, images, clips, answer=answer)
            num_over = encoded.num_tokens - limit
            if num_over <= 0:
                return encoded, was_reduced, False
            if must_cut and encoded.num_kept < limit:
                return encoded.cut(limit), was_reduced, True
            budget = self._fitter.count(images, clips) - num_over  # the prediction was too low by so much
        raise SkipSample("too_long", f"max_length {limit} has no room for the media in their smallest form")

    def _visual_budget(self, text: TextLength, images: list[Image.Image], clips: list[Clip]) -> tuple[int, bool]:
        """Decide how many visual tokens a sample may have, and whether its text has to be cut."""
        limit = self._config.text_processing.max_length
        room_beside_text = limit - text.num_tokens
        if self._fitter.count(images, clips) <= room_beside_text:
            return room_beside_text, False
        smallest = self._fitter.smallest(images, clips)
        if smallest <= room_beside_text:
            return room_beside_text, False
        needed = text.num_before_answer if self._config.label_masking.mask_input_tokens else text.num_before_visual_end
        room = limit - needed - 1
        if self._for_generation or room < smallest:
            raise SkipSample(
                "too_long",
                f"{text.num_tokens} tokens of text and at least {smallest} of media, max_length is {limit}",
            )
        return max(smallest, min(limit // 2, room)), True


@contextmanager
def _seeded(seed: int, step: int, ref: SampleRef) -> Iterator[None]:
    """Let what a processor draws depend on the sample and the step alone; the process's generator is left alone."""
    mixed = 0
    for value in (seed, step, ref.source, ref.index, ref.repeat):
        mixed = (mixed * 0x9E3779B97F4A7C15 + value + 1) % 2**63
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mixed)  # not torch.manual_seed: it would reach out for the GPU
        yield
