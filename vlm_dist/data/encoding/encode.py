"""From rendered text and decoded media to the tensors of one sample, through the model's own processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_dist.data.encoding.align import align_answers
from vlm_dist.data.encoding.labels import RenderedText, Span, answer_tokens, markers_alone
from vlm_dist.data.encoding.quick_processor import quicken
from vlm_dist.data.media.images import Picture, as_pil, with_clear_sides
from vlm_dist.data.media.video import Clip
from vlm_dist.errors import ConfigError, ModelError, SkipSample
from vlm_dist.families import Family

# Shapes: T tokens of the sample; visual tensors as the family has them, never sliced on dim 0


@dataclass(slots=True)
class Encoded:
    """One sample as the processor sees it.

    Attributes:
        tokens: keys with one entry per token, [T] each; `input_ids` is one of them.
        visual: the other keys.
        answers: bool [T], tokens of the answers with their terminators.
        is_visual: bool [T], tokens that the processor puts in the place of media: those of their features, and what
            it writes around them (row numbers, times of frames).
    """

    tokens: dict[str, Tensor]
    visual: dict[str, Tensor]
    answers: Tensor
    is_visual: Tensor

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.tokens["input_ids"].shape[0])

    @property
    def num_kept(self) -> int:
        """Tokens up to the last visual one, which can never be cut."""
        places = self.is_visual.nonzero()
        return int(places[-1]) + 1 if len(places) else 0

    def cut(self, max_length: int) -> Encoded:
        """Cut the text at the end."""
        assert self.num_kept <= max_length
        tokens = {key: value[:max_length] for key, value in self.tokens.items()}
        return Encoded(tokens, self.visual, self.answers[:max_length], self.is_visual[:max_length])


@dataclass(frozen=True, slots=True)
class TextLength:
    """Tokens of a sample's text alone, its placeholders not counted.

    Attributes:
        num_tokens: of the whole text.
        num_before_visual_end: before the last placeholder.
        num_before_answer: before the first answer, or before the last placeholder if that comes later.
    """

    num_tokens: int
    num_before_visual_end: int
    num_before_answer: int


class Encoder:
    """Calls the processor on one sample at a time.

    Args:
        processor: of the model; kept as `processor`, for messages.
        family: its row.
    """

    def __init__(self, processor: Any, family: Family) -> None:
        self.processor = processor
        self._processor = quicken(processor)
        self._family = family
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self._has_offsets = bool(getattr(self.tokenizer, "is_fast", False))
        #: Whether the processor may say what it puts in the place of placeholders; some that could do not.
        self._tells_expansions = self._has_offsets and hasattr(processor, "get_text_with_replacements")
        # the other processors, those in a model's own repository among them, may know Pillow's pictures alone
        self._takes_tensors = getattr(getattr(processor, "image_processor", None), "backend", None) == "torchvision"
        self._visual_ids = torch.tensor(sorted(_visual_ids(processor, self.tokenizer, family)), dtype=torch.int64)

    def encode(
        self,
        rendered: RenderedText,
        images: Sequence[Picture] = (),
        clips: Sequence[Clip] = (),
        *,
        answer: str | None = None,
        do_resize: bool | None = None,
    ) -> Encoded:
        """Turn one sample into tensors. Nothing is padded or cut.

        Args:
            rendered: the text, with one placeholder per image and video.
            images: in the order of their placeholders.
            clips: the same.
            answer: for families that take it apart from the text.
            do_resize: False keeps the processor from resizing.

        Raises:
            SkipSample: ("bad_sample") the processor refuses the sample.
        """
        try:
            data = self._call(rendered.text, images, clips, answer, do_resize)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            # a systematic refusal shows when the materialiser encodes its dummies, before training
            message = f"the processor refuses the sample: {type(error).__name__}: {error}"
            raise SkipSample("bad_sample", message) from error
        offsets = data.pop("offset_mapping", None)
        replacements = data.pop("text_replacement_offsets", None)
        data.pop("labels", None)
        input_ids = _as_tensor(data["input_ids"])[0]
        length = input_ids.shape[0]
        tokens: dict[str, Tensor] = {}
        visual: dict[str, Tensor] = {}
        for key, value in data.items():
            tensor = _as_tensor(value)
            if key == "input_ids" or key in self._family.pad_values:
                assert tensor.shape == (1, length), f"{key}: {tuple(tensor.shape)}, expected (1, {length})"
                tokens[key] = tensor[0]
            else:
                visual[key] = tensor
        is_visual = torch.isin(input_ids, self._visual_ids) | (input_ids < 0)
        if self._family.answer_argument is not None:
            answers = tokens["token_type_ids"] == 1
        elif offsets is not None and (replacements is not None or not (images or clips)):
            characters = _as_tensor(offsets)[0]  # [T, 2]
            shown = self._check_replacements(rendered, replacements)
            answers = answer_tokens(characters, [_shifted(span, shown) for span in rendered.answers])
            is_visual |= answer_tokens(characters, _expansions(shown))
        elif rendered.answers and self._has_offsets:
            plain = self._tokenize(rendered.text)
            marked = answer_tokens(plain["offset_mapping"], rendered.answers)
            answers = align_answers(plain["input_ids"], marked, input_ids, is_visual)
        else:
            answers = torch.zeros(length, dtype=torch.bool)
        return Encoded(tokens, visual, answers, is_visual)

    def choose_picture_form(self, marker: str) -> None:
        """Find out whether the processor takes pictures as tensors, which saves a copy; some know Pillow's alone.

        Args:
            marker: what a text has in the place of one image.

        Raises:
            SkipSample: it refuses both.
        """
        if not self._takes_tensors:
            return
        side = self.dummy_side("image")
        try:
            self.encode(markers_alone(marker), [torch.zeros((3, side, side), dtype=torch.uint8)])
        except SkipSample:
            self._takes_tensors = False

    @property
    def finds_answers(self) -> bool:
        """Whether `Encoded.answers` can be relied on: it is known which characters a token comes from."""
        return self._has_offsets or self._family.answer_argument is not None

    def measure_text(self, rendered: RenderedText, answer: str | None = None) -> TextLength:
        """Count the tokens of a text, without its media."""
        tokenized = self._tokenize(rendered.text)
        is_visual = torch.isin(torch.tensor(tokenized["input_ids"], dtype=torch.int64), self._visual_ids)
        num_text = int((~is_visual).sum())
        places = is_visual.nonzero()
        before_visual_end = int((~is_visual[: int(places[-1])]).sum()) if len(places) else 0
        if answer is not None:
            num_answer = len(self.tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1  # and its terminator
            num_prompt = num_text + 2  # the processor adds bos and a line break
            return TextLength(num_prompt + num_answer, before_visual_end, num_prompt)
        before_answer = before_visual_end
        if rendered.answers and self._has_offsets:
            answers = answer_tokens(tokenized["offset_mapping"], rendered.answers).nonzero()
            if len(answers):
                before_answer = max(before_answer, int((~is_visual[: int(answers[0])]).sum()))
        return TextLength(num_text, before_visual_end, before_answer)

    def dummy_side(self, kind: str) -> int:
        """Side in pixels of the smallest square picture that stands for one token, or the family's own."""
        if self._family.dummy_side_pixels is not None:
            return self._family.dummy_side_pixels
        part = getattr(self._processor, f"{kind}_processor", None) or self._processor.image_processor
        if not hasattr(part, "patch_size"):
            raise ConfigError(
                f"model_classes: family {self._family.name} does not fit the processor: {type(part).__name__} has no "
                "patch_size. Name the family that the model belongs to, or say family.dummy_side_pixels"
            )
        return int(part.patch_size) * int(getattr(part, "merge_size", 1))

    def _tokenize(self, text: str) -> Mapping[str, Any]:
        """The tokens of a text as it is, with their characters where the tokenizer tells them."""
        tokenized: Mapping[str, Any] = self.tokenizer(
            text, add_special_tokens=self._adds_special_tokens(text), return_offsets_mapping=self._has_offsets
        )
        return tokenized

    def _adds_special_tokens(self, text: str) -> bool:
        bos = self.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    def _call(
        self,
        text: str,
        images: Sequence[Picture],
        clips: Sequence[Clip],
        answer: str | None,
        do_resize: bool | None,
    ) -> dict[str, Any]:
        text_arguments: dict[str, Any] = {"add_special_tokens": self._adds_special_tokens(text)}
        wants_offsets = self._tells_expansions and self._family.answer_argument is None
        if wants_offsets:
            text_arguments["return_offsets_mapping"] = True
        if self._family.processor_needs_image and not images:
            return self._tokenize_alone(text, answer, text_arguments)
        arguments: dict[str, Any] = {"text_kwargs": text_arguments}
        if wants_offsets:
            arguments["return_text_replacement_offsets"] = True
        if answer is not None:
            assert self._family.answer_argument is not None
            arguments[self._family.answer_argument] = [answer]
        visual: dict[str, Any] = {"return_tensors": "pt"}  # not for the text: it stays lists, which can be ragged
        if do_resize is not None:
            visual["do_resize"] = do_resize
        if images:
            shown = [with_clear_sides(image) for image in images]
            arguments["images"] = [shown if self._takes_tensors else [as_pil(image) for image in shown]]
            arguments["images_kwargs"] = visual
        if clips:
            arguments["videos"] = [clip.frames for clip in clips]
            arguments["videos_kwargs"] = dict(visual)
            if self._family.needs_video_metadata:
                arguments["videos_kwargs"] |= {
                    "do_sample_frames": False,
                    "video_metadata": [clip.metadata for clip in clips],
                }
        return dict(self._processor(text=[text], **arguments))

    def _tokenize_alone(self, text: str, answer: str | None, text_arguments: dict[str, Any]) -> dict[str, Any]:
        """A sample without an image, in the layout that the processor gives to one with images."""
        pair = None if answer is None else [answer + (self.tokenizer.eos_token or "")]
        return dict(
            self.tokenizer(
                [(self.tokenizer.bos_token or "") + text + "\n"],
                text_pair=pair,
                return_token_type_ids=True,
                **text_arguments,
            )
        )

    def _check_replacements(self, rendered: RenderedText, replacements: Any) -> list[dict[str, Any]]:
        """What the processor put in the place of which placeholder, in the order of the text."""
        shown = replacements[0] if replacements else []
        for one in shown:
            start, end = one["span"]
            if rendered.text[start:end] != one["text"]:
                raise ModelError(f"{type(self._processor).__name__} edits the text before it expands {one['text']!r}")
        return sorted(shown, key=lambda one: int(one["span"][0]))


def _shifted(span: Span, replacements: Sequence[dict[str, Any]]) -> Span:
    """Move a span of the text to where it is once the placeholders before it are expanded."""
    moved = []
    for position in span:
        before = [one for one in replacements if one["span"][1] <= position]
        moved.append(position + sum(len(one["replacement"]) - len(one["text"]) for one in before))
    return moved[0], moved[1]


def _expansions(replacements: Sequence[dict[str, Any]]) -> list[Span]:
    """Spans of what placeholders became, in the text with all of them expanded."""
    spans, longer = [], 0
    for one in replacements:
        start = one["span"][0] + longer
        spans.append((start, start + len(one["replacement"])))
        longer += len(one["replacement"]) - len(one["text"])
    return spans


def _visual_ids(processor: Any, tokenizer: Any, family: Family) -> set[int]:
    names = [*family.image_tokens, *family.video_tokens]
    ids = {tokenizer.convert_tokens_to_ids(name) for name in names}
    if not names:
        for kind in ("image", "video"):
            ids.add(getattr(processor, f"{kind}_token_id", None))
            ids |= set(getattr(processor, f"{kind}_token_ids", None) or ())
    return {int(one) for one in ids if one is not None and one != getattr(tokenizer, "unk_token_id", None)}


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
        return torch.stack(list(value))
    array = np.asarray(value)
    return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array)
