"""Makes one micro-batch of the plan: reads, decodes, renders, encodes and collates its samples.

Stateless: the same job gives the same micro-batch, bit for bit, in any process and on any rank.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from vlm_dist.config.vlm_collator import VlmCollatorConfig
from vlm_dist.data.encoding.collate import Example, Padding, RopePositions, attach_dummies, collate
from vlm_dist.data.encoding.conversation import Conversation
from vlm_dist.data.encoding.dummies import DummyRows
from vlm_dist.data.encoding.encode import Encoder
from vlm_dist.data.encoding.fit import Fitter, MediaSizes, VisualCounter
from vlm_dist.data.encoding.fitted import Fitted, FittingEncoder, SampleLength
from vlm_dist.data.encoding.inside import SampleInside
from vlm_dist.data.encoding.labels import RenderedText, Renderer, make_labels
from vlm_dist.data.encoding.packing import PackRoom, filler, pack
from vlm_dist.data.encoding.preconditions import (
    check_columns,
    check_family,
    check_labels,
    check_messages,
    choose_kinds,
    choose_pad_token,
    choose_video_libraries,
    find_markers,
)
from vlm_dist.data.encoding.template import MessageBuilder
from vlm_dist.data.lengths.headers import clip_shape, picture_size
from vlm_dist.data.made_samples import MadeSample, take_room, with_equal_frames
from vlm_dist.data.media.configured import configured_image, configured_video
from vlm_dist.data.media.images import Picture
from vlm_dist.data.media.video import Clip, repeat_last_frame
from vlm_dist.data.types import (
    IGNORE_INDEX,
    MicroBatch,
    MicroBatchJob,
    NullSlot,
    RawSample,
    SampleOrigin,
    SampleRef,
    Source,
)
from vlm_dist.data.workers import progress
from vlm_dist.errors import ModelError, SkipSample, VlmDistError
from vlm_dist.families import Family

T = TypeVar("T")

#: What no sample can be to blame for: raised, where any other surprise costs the sample alone.
_OUR_BUGS = (AssertionError, AttributeError, ImportError, NameError, NotImplementedError)


class Materialiser:
    """Turns jobs into micro-batches; never raises for the sake of one sample. Picklable.

    A sample that cannot be used leaves an empty slot. Where after decoding nothing of a kind in `towers` is left, one
    dummy per kind is added behind the samples: all ranks must call the same towers. A micro-batch without samples is
    the smallest text plus these dummies. Nothing of a dummy carries loss or is counted as a token of the data.

    Args:
        sources: the data; a `SampleRef.source` is a position in it.
        processor: of the model.
        family: its row in the table.
        collator_config: from columns to labels.
        towers: kinds of media, of "image" and "video", that every micro-batch must have.
        seed: of the run, for processors that draw random numbers.
        for_generation: prompts without the last answer, padded on the left; the answers are `references`, labels are
            all ignored.
        several_answers: a list in the column of the answer means that each of them is right: the first is what labels
            and `references` have, the others are `other_references`. Always so `for_generation`.
        rope_positions: the model's own positions of one row; needed for packs of families with "mrope". Prompts are
            numbered by the model.

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
        rope_positions: RopePositions | None = None,
        several_answers: bool = False,
    ) -> None:
        self._sources = list(sources)
        self._family = family
        self._config = collator_config
        self._seed = seed
        self._for_generation = for_generation
        self._several_answers = several_answers or for_generation
        self._rope_positions = rope_positions
        self._towers = towers
        check_family(family)
        kinds = choose_kinds(collator_config, family)
        self._builder = MessageBuilder(collator_config.dataset_columns.mapping, collator_config.message_format, kinds)
        check_columns(self._builder, self._sources)
        check_labels(collator_config, family)
        self._video_libraries = choose_video_libraries(collator_config)
        self._renderer = Renderer(processor, family)
        check_messages(self._renderer, self._builder, towers)
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
            multiple=(None if for_generation else collator_config.text_processing.pad_to_multiple_of) or 1,
        )
        markers = find_markers(kinds, processor, family)
        if "image" in markers:
            self._encoder.choose_picture_form(markers["image"])
        wanted = [kind for kind in sorted(kinds) if kind in towers]
        self._dummies = DummyRows(self._encoder, family, markers, wanted)
        self.visual_counter = VisualCounter(self._encoder, processor, markers, family)
        fitter = Fitter(self.visual_counter, family)
        self._fitting_encoder = FittingEncoder(self._encoder, fitter, collator_config, for_generation)

    def __call__(self, job: MicroBatchJob) -> MicroBatch:
        """Make one micro-batch.

        Raises:
            DataError: the storage fails; no single sample is to blame.
        """
        return self._compose(job, self._materialise)[0]

    def look_inside(self, job: MicroBatchJob) -> tuple[MicroBatch, list[SampleInside | NullSlot]]:
        """Make one micro-batch, and tell what its samples were on the way, slot by slot; for a person's eyes.

        Raises:
            DataError: the storage fails.
        """
        batch, outcomes = self._compose(job, self._materialise_in_sight)
        told: list[SampleInside | NullSlot] = []
        row = start = 0
        for outcome in outcomes:
            if isinstance(outcome, NullSlot):
                told.append(outcome)
                continue
            assert outcome.inside is not None
            length = outcome.example.labels.shape[0]
            if self._padding.side == "left":
                start = batch.labels.shape[1] - length
            told.append(replace(outcome.inside, row=row, start=start))
            row, start = (0, start + length) if job.pack is not None else (row + 1, 0)
        return batch, told

    def _compose(
        self, job: MicroBatchJob, make: Callable[[RawSample, SampleRef, int], MadeSample]
    ) -> tuple[MicroBatch, list[MadeSample | NullSlot]]:
        outcomes = {slot: self._try(job, slot, make) for slot in _working_order(job)}
        progress.between_samples()
        samples: list[MadeSample] = []
        null_slots: list[NullSlot] = []
        room = PackRoom(job.pack) if job.pack is not None else None
        for slot in range(len(job.refs)):  # the plan's order, whatever the order of work was
            outcome = outcomes[slot]
            if isinstance(outcome, MadeSample) and room is not None:
                outcome = outcomes[slot] = take_room(room, outcome)
            if isinstance(outcome, MadeSample):
                samples.append(outcome)
            else:
                null_slots.append(outcome)
        if self._family.equal_frames:
            samples, unequal = with_equal_frames(samples)
            null_slots += unequal.values()
            outcomes |= {slot: unequal.get(id(outcome), outcome) for slot, outcome in outcomes.items()}
        examples = [sample.example for sample in samples]
        examples += self._dummies.missing(examples)
        if job.pack is None:
            rows = attach_dummies(examples, self._family, self._padding)
            rope_positions = None if self._for_generation else self._rope_positions
            inputs, labels = collate(rows, self._family, self._padding, rope_positions)
        else:
            examples += filler(examples, self._family, self._padding)
            inputs, labels = pack(examples, self._family, self._rope_positions)
        sample_tokens = [sample.example.labels.shape[0] for sample in samples]
        pieces = labels[: len(samples)] if job.pack is None else labels[0, : sum(sample_tokens)].split(sample_tokens)
        batch = MicroBatch(
            job=job,
            inputs=inputs,
            labels=labels.masked_fill(labels == IGNORE_INDEX, self._config.label_masking.ignore_index),
            num_samples=len(samples),
            num_target_tokens=int((labels != IGNORE_INDEX).sum()),
            num_tokens=sum(sample_tokens),
            num_computed_tokens=labels.numel(),
            null_slots=null_slots,
            origins=[sample.origin for sample in samples],
            refs=[sample.ref for sample in samples],
            references=[sample.reference for sample in samples] if self._for_generation else [],
            other_references=[sample.other_references for sample in samples] if self._for_generation else [],
            num_reduced=sum(sample.was_reduced for sample in samples),
            num_cut=sum(sample.was_cut for sample in samples),
            sample_tokens=sample_tokens,
            sample_targets=[int((piece != IGNORE_INDEX).sum()) for piece in pieces],
            kinds=frozenset(kind for sample in samples for kind in sample.example.kinds),
        )
        return batch, [outcomes[slot] for slot in range(len(job.refs))]

    def name_samples(self, job: MicroBatchJob) -> list[str]:
        """Name a job's samples, for messages."""
        return [str(self._sources[ref.source].origin(ref.index)) for ref in job.refs if ref is not None]

    def measure(self, job: MicroBatchJob) -> list[SampleLength | NullSlot]:
        """Count the tokens of each sample of a job, without decoding where its headers and its text tell all.

        Raises:
            DataError: the storage fails.
        """
        lengths = {slot: self._try(job, slot, self._measure) for slot in _working_order(job)}
        return [lengths[slot] for slot in range(len(job.refs))]

    def measure_text(self, fields: Mapping[str, Any] | None = None) -> int:
        """Count the tokens of a sample's text as the model reads it, with the template but without its media.

        Args:
            fields: of the sample; None: one whose texts are all empty.

        Raises:
            SkipSample: a column is missing or not what it should be.
        """
        raw = RawSample(self._builder.empty_fields() if fields is None else fields, SampleOrigin("", "", ""))
        _, rendered, _, answer = self._render(raw)
        return self._encoder.measure_text(rendered, answer).num_tokens

    def _try(self, job: MicroBatchJob, slot: int, make: Callable[[RawSample, SampleRef, int], T]) -> T | NullSlot:
        """Make something of one sample, or say why there is nothing.

        Raises:
            DataError: the storage fails.
        """
        ref = job.refs[slot]
        if ref is None:
            return NullSlot(None, "tail", "the epoch has no more samples")
        source = self._sources[ref.source]
        try:
            for condemned in job.condemned:
                if condemned.slot == slot:
                    raise SkipSample(condemned.null_class, condemned.message)
            progress.reading(slot)
            raw = source.read(ref.index)
            progress.decoding(slot)
            return make(raw, ref, job.step)
        except SkipSample as skip:
            return NullSlot(source.origin(ref.index), skip.null_class, skip.message)
        except (VlmDistError, OSError, *_OUR_BUGS):
            raise
        except Exception as error:  # noqa: BLE001 - named in the quarantine; the error budget ends a run full of them
            return NullSlot(source.origin(ref.index), "bad_sample", _in_a_line(error))

    def _measure(self, raw: RawSample, ref: SampleRef, step: int) -> SampleLength:
        conversation, rendered, _, answer = self._render(raw)
        sizes = self._probe(conversation)
        if sizes is not None and answer is None:
            length = self._fitting_encoder.foretell(rendered, sizes)
            if length is not None:
                return length
        sample = self._materialise(raw, ref, step)
        num_visual = sample.num_patches // self._family.patches_per_token
        return SampleLength(sample.example.labels.shape[0], num_visual, sample.was_reduced, sample.was_cut)

    def _render(self, raw: RawSample) -> tuple[Conversation, RenderedText, str, str | None]:
        """Make the conversation, its text, the reference and, where it is no part of the text, the answer."""
        fields = self._builder.each_answer(raw.fields)[0] if self._several_answers else raw.fields
        conversation = self._builder.build(fields)
        reference = ""
        answer: str | None = None
        if self._for_generation or self._family.answer_argument is not None:
            conversation, reference = conversation.prompt()
            answer = None if self._for_generation else reference
        wants_answer = self._for_generation or self._config.text_processing.add_generation_prompt
        rendered = self._renderer.render(conversation.messages, add_generation_prompt=wants_answer)
        return conversation, rendered, reference, answer

    def _probe(self, conversation: Conversation) -> MediaSizes | None:
        """Tell the sizes of a sample's media from their headers; None where they do not tell."""
        images = [picture_size(image, self._config.image_processing) for image in conversation.images]
        settings, min_frames = self._config.video_processing, self._family.min_frames
        clips = [clip_shape(video, settings, min_frames) for video in conversation.videos]
        if None in images or None in clips:
            return None
        return MediaSizes(tuple(filter(None, images)), tuple(filter(None, clips)))

    def _materialise(self, raw: RawSample, ref: SampleRef, step: int) -> MadeSample:
        return self._encode(raw, ref, step)[0]

    def _materialise_in_sight(self, raw: RawSample, ref: SampleRef, step: int) -> MadeSample:
        sample, conversation, rendered, fitted = self._encode(raw, ref, step)
        sample.inside = SampleInside.of(raw, ref, conversation, rendered, fitted)
        return sample

    def _encode(
        self, raw: RawSample, ref: SampleRef, step: int
    ) -> tuple[MadeSample, Conversation, RenderedText, Fitted]:
        conversation, rendered, reference, answer = self._render(raw)
        images = [self._decode_image(image) for image in conversation.images]
        clips = [self._decode_video(video) for video in conversation.videos]
        with _seeded(self._seed, step, ref):
            fitted = self._fitting_encoder.encode(rendered, images, clips, answer)
        encoded = fitted.encoded
        if self._for_generation:
            labels = torch.full_like(encoded.tokens["input_ids"], IGNORE_INDEX)
        else:
            labels = make_labels(
                encoded.tokens["input_ids"], encoded.answers, encoded.is_visual, self._config.label_masking
            )
            if fitted.was_cut and not (labels != IGNORE_INDEX).any():
                raise SkipSample("too_long", "nothing of the answer is within max_length")
        kinds = frozenset(kind for kind, items in (("image", images), ("video", clips)) if items)
        example = Example(encoded.tokens, encoded.visual, labels, kinds)
        num_patches = int(encoded.is_visual.sum()) * self._family.patches_per_token
        num_frames = max((len(clip.indices) for clip in fitted.clips), default=None)
        others = self._other_references(raw)
        seen = (num_patches, num_frames, reference, others, fitted.was_reduced, fitted.was_cut)
        sample = MadeSample(example, raw.origin, ref, *seen)
        return sample, conversation, rendered, fitted

    def _other_references(self, raw: RawSample) -> tuple[str, ...]:
        if not self._for_generation:
            return ()
        return tuple(self._builder.build(one).prompt()[1] for one in self._builder.each_answer(raw.fields)[1:])

    def _decode_image(self, media: bytes) -> Picture:
        return configured_image(media, self._config)

    def _decode_video(self, media: bytes) -> Clip:
        clip = configured_video(media, self._config, self._video_libraries)
        return repeat_last_frame(clip, self._family.min_frames)


def _working_order(job: MicroBatchJob) -> list[int]:
    """All slots, suspects first."""
    return sorted(range(len(job.refs)), key=lambda slot: slot not in job.suspects)


def _in_a_line(error: Exception) -> str:
    """What an unforeseen error was, and in which file and line it arose."""
    first_line = (str(error).strip().splitlines() or [""])[0][:300]
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere"
    return f"unforeseen {type(error).__name__} at {place}: {first_line}"


@contextmanager
def _seeded(seed: int, step: int, ref: SampleRef) -> Iterator[None]:
    """Let what a processor draws depend on the sample and the step alone; the process's generator is left alone."""
    mixed = 0
    for value in (seed, step, ref.source, ref.index, ref.repeat):
        mixed = (mixed * 0x9E3779B97F4A7C15 + value + 1) % 2**63
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mixed)  # not torch.manual_seed: it would reach out for the GPU
        yield
