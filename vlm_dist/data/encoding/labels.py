"""Which tokens carry loss: exact spans of the answers in the rendered text, and the labels made of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from vlm_dist.config.vlm_collator import LabelMasking
from vlm_dist.data.encoding.conversation import ChatMessage
from vlm_dist.data.types import IGNORE_INDEX
from vlm_dist.errors import ModelError, SkipSample
from vlm_dist.families import Family

Span = tuple[int, int]  # characters, end exclusive

_PRIVATE_USE = range(0xE000, 0xF8FF)


@dataclass(frozen=True, slots=True)
class RenderedText:
    """A conversation as one text, before placeholders are expanded.

    Attributes:
        text: what the processor gets.
        answers: what the assistant says, each with its terminator.
    """

    text: str
    answers: tuple[Span, ...] = ()


def markers_alone(marker: str, count: int = 1) -> RenderedText:
    """A text that is nothing but the markers of some images (or clips), numbered where they have to be."""
    return RenderedText("".join(marker.replace("{n}", str(number)) for number in range(1, count + 1)))


class Renderer:
    """Renders conversations through the processor's chat template, and finds the answers in the result.

    Args:
        processor: of the model.
        family: has the template for a processor without one.

    Raises:
        ModelError: there is no chat template.
    """

    def __init__(self, processor: Any, family: Family) -> None:
        self._processor = processor
        tokenizer = getattr(processor, "tokenizer", processor)
        self._template: str | None = None  # the processor's own
        #: Name of the family whose form is used, for a model without a chat template.
        self.substitute_of: str | None = None
        if not getattr(processor, "chat_template", None):
            self._template = getattr(tokenizer, "chat_template", None)
            if self._template is None and family.fallback_template is not None:
                self._template, self.substitute_of = family.fallback_template, family.name
            if self._template is None:
                raise ModelError(
                    f"{type(processor).__name__} has no chat template, and the family {family.name!r} has no other; "
                    "put a chat_template.jinja beside the model's tokenizer"
                )
        self._eos: str = tokenizer.eos_token or ""
        visual = set(family.image_tokens) | set(family.video_tokens)
        visual |= {getattr(processor, name, None) or "" for name in ("image_token", "video_token", "boi_token")}
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        self._visual_tokens = sorted(visual - {""})
        enders = sorted(special - visual - {""}, key=lambda token: (-len(token), token))
        self._ender = re.compile(r"\s*(?:" + "|".join(map(re.escape, enders)) + ")") if enders else None
        self._of_prompt, self._of_answer = self._find_lead()

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = False) -> RenderedText:
        """Render a conversation.

        An answer's span begins where the generation prompt ends, so that the model learns to say a space between the
        two; where they differ in their white space, the prompt's is put there. It goes on to the token that ends the
        turn; where the template has none, the tokenizer's end-of-sequence token is put there, so that the model learns
        to stop.

        Raises:
            SkipSample: ("bad_sample") a text contains a placeholder token, or the template refuses the conversation or
                changes an answer.
        """
        texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        self._refuse_placeholders(texts)
        plain = self._apply(messages, add_generation_prompt)
        if not any(message["role"] == "assistant" for message in messages):
            return RenderedText(plain)
        opening, closing = _unused_characters(texts)
        for inside_spaces in (False, True):  # the second for templates that trim what is said
            marks = _mark_answers(messages, opening, closing, inside_spaces)
            marked = self._apply(marks, add_generation_prompt)
            if marked.replace(opening, "").replace(closing, "") == plain:
                return self._end_answers(marked, opening, closing)
        raise SkipSample("bad_sample", "the chat template changes the answers: they cannot be found in its text")

    def _find_lead(self) -> tuple[str, str]:
        """The white space behind what generation prompt and answer have in common: of the one, and of the other.

        ("", " ") for "ASSISTANT:" and "ASSISTANT: It is."; LLaVA-OneVision has two line ends that differ by a space.
        """
        question: ChatMessage = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        answer: ChatMessage = {"role": "assistant", "content": [{"type": "text", "text": "!"}]}
        try:
            prompt, whole = self._apply([question], True), self._apply([question, answer], False)
        except Exception:  # noqa: BLE001 - a template that takes other conversations only; samples will tell
            return "", ""
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))
        of_prompt, of_answer = prompt[common:], whole[common:].partition("!")[0]
        return (of_prompt, of_answer) if not (of_prompt + of_answer).strip() else ("", "")

    def _apply(self, messages: Sequence[ChatMessage], add_generation_prompt: bool) -> str:
        arguments: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        if self._template is not None:
            arguments["chat_template"] = self._template
        try:
            rendered = self._processor.apply_chat_template(list(messages), **arguments)
        except TemplateError as error:  # roles in an order that it does not know, for one
            roles = ", ".join(message["role"] for message in messages)
            raise SkipSample(
                "bad_sample", f"the model's chat template refuses the conversation (roles: {roles}): {error}"
            ) from error
        assert isinstance(rendered, str)
        return rendered

    def _end_answers(self, marked: str, opening: str, closing: str) -> RenderedText:
        """Remove the marks, extend each answer over its terminator, and add terminators where there are none."""
        pieces = re.split(f"[{opening}{closing}]", marked)  # outside, answer, outside, answer, outside
        text = pieces[0]
        spans = []
        for answer, after in zip(pieces[1::2], pieces[2::2], strict=True):
            start = len(text)
            if self._of_answer and text.endswith(self._of_answer):
                start -= len(self._of_answer)
                if self._of_prompt:  # the model is asked with the prompt's: it learns to go on from there
                    text, start = text[:start] + self._of_prompt, start + len(self._of_prompt)
            match = self._ender.match(after) if self._ender else None
            end = match.group() if match else self._eos
            text += answer + end
            spans.append((start, len(text)))
            text += after[len(end) :] if match else after
        return RenderedText(text, tuple(spans))

    def _refuse_placeholders(self, texts: Sequence[str]) -> None:
        for token in self._visual_tokens:
            if any(token in text for text in texts):
                raise SkipSample(
                    "bad_sample",
                    f"a text contains the placeholder token {token!r}; remove it from the data, "
                    "or name a column of conversations as dataset_columns.messages_column",
                )


def _unused_characters(texts: Sequence[str]) -> tuple[str, str]:
    """Choose two private-use characters that no text has."""
    used = set("".join(texts))
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    return next(free), next(free)


def _mark_answers(
    messages: Sequence[ChatMessage], opening: str, closing: str, inside_spaces: bool
) -> list[ChatMessage]:
    """Put marks round the words of each turn of the assistant, outside or inside its outer spaces."""
    marked = copy.deepcopy(list(messages))
    for message in marked:
        if message["role"] != "assistant":
            continue
        parts = [part for part in message["content"] if part["type"] == "text"]
        if not parts:
            raise SkipSample("bad_sample", "a turn of the assistant has no text")
        first, last = parts[0], parts[-1]
        words = first["text"].lstrip() if inside_spaces else first["text"]
        first["text"] = first["text"][: len(first["text"]) - len(words)] + opening + words
        words = last["text"].rstrip() if inside_spaces else last["text"]
        last["text"] = words + closing + last["text"][len(words) :]
    return marked


def answer_tokens(offsets: Sequence[Span] | Tensor, answers: Sequence[Span]) -> Tensor:
    """Find the tokens of the answers.

    Args:
        offsets: per token, its characters in the text, [T, 2]; an empty span for tokens that were added.
        answers: spans in the same text.

    Returns:
        bool [T]; a token that shares a character with an answer belongs to it.
    """
    mask = torch.zeros(len(offsets), dtype=torch.bool)
    if not answers:
        return mask
    starts, ends = torch.as_tensor(offsets, dtype=torch.int64).T
    for start, end in answers:
        mask |= (starts < end) & (ends > start) & (ends > starts)
    return mask


def make_labels(input_ids: Tensor, answers: Tensor, visual: Tensor, masking: LabelMasking) -> Tensor:
    """Make the labels of one sample.

    Args:
        input_ids: [T].
        answers: bool [T], tokens of the answers with their terminators.
        visual: bool [T], tokens that stand for image or video features.
        masking: `mask_input_tokens` leaves the answers alone; `mask_image_token` takes the visual tokens out.

    Returns:
        int64 [T]; the first is always `IGNORE_INDEX`, as nothing comes before it to predict it from.
    """
    labels = input_ids.clone()
    if masking.mask_input_tokens:
        labels[~answers] = IGNORE_INDEX
    if masking.mask_image_token:
        labels[visual] = IGNORE_INDEX
    labels[input_ids < 0] = IGNORE_INDEX  # some families number their images below 0
    labels[:1] = IGNORE_INDEX
    return labels
