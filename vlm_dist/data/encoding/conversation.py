"""Conversations: turns of text, images and videos; and reading those that the data holds itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_dist.errors import SkipSample

#: One turn as chat templates take it: `{"role": …, "content": [{"type": "text", "text": …} | {"type": "image"} | …]}`.
ChatMessage = dict[str, Any]

_MARKER = re.compile(r"<(image|video)>")
_ROLES = {role: role for role in ("user", "assistant", "system")}
_ROLES |= {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "developer": "system"}
#: Types of the parts of a content list, of the OpenAI style and of chat templates.
_PART_KINDS = {"text": "text", "input_text": "text", "output_text": "text"}
_PART_KINDS |= {"image": "image", "image_url": "image", "input_image": "image"}
_PART_KINDS |= {"video": "video", "video_url": "video", "input_video": "video"}


@dataclass(slots=True)
class Conversation:
    """What is said, and what is shown.

    Attributes:
        messages: the turns.
        images: encoded images in the order of their placeholders.
        videos: the same for videos.
    """

    messages: list[ChatMessage] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)
    videos: list[bytes] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        """All texts of all turns."""
        return [part["text"] for message in self.messages for part in message["content"] if part["type"] == "text"]

    def prompt(self) -> tuple[Conversation, str]:
        """Split the last answer off.

        Returns:
            The conversation before the last turn of the assistant, and the text of that turn.

        Raises:
            SkipSample: ("bad_sample") the assistant says nothing.
        """
        last = max((i for i, message in enumerate(self.messages) if message["role"] == "assistant"), default=None)
        if last is None:
            raise SkipSample("bad_sample", "the conversation has no turn of the assistant")
        kept, answer = self.messages[:last], self.messages[last]
        shown = [part["type"] for message in kept for part in message["content"]]
        before = Conversation(kept, self.images[: shown.count("image")], self.videos[: shown.count("video")])
        return before, "".join(part["text"] for part in answer["content"] if part["type"] == "text")


def show_media(conversation: Conversation, content: list[dict[str, Any]], kind: str, items: Sequence[bytes]) -> None:
    """Add media and their placeholders to a turn's content."""
    content.extend({"type": kind} for _ in items)
    (conversation.images if kind == "image" else conversation.videos).extend(items)


def read_conversation(value: Any, column: str, media: Mapping[str, list[bytes]]) -> Conversation:
    """Read a conversation that the data holds itself.

    A turn is `{"role": …, "content": …}` or `{"from": …, "value": …}`. Its content is a text, in which `<image>` and
    `<video>` stand for the media, in order; or a list of parts, `{"type": "text", "text": …}`, `{"type": "image"}`
    (also `image_url`), `{"type": "video"}`, with the same meaning.

    Args:
        value: the turns, or their JSON.
        column: where they come from, for messages.
        media: kind -> the media of the sample, of the kinds that are read.

    Raises:
        SkipSample: ("bad_sample") it is none of these, its placeholders are not as many as its media, or the last turn
            is not the assistant's.
    """
    turns = parse_turns(value)
    if turns is None:
        raise SkipSample("bad_sample", f"column {column!r} is no list of messages")
    conversation = Conversation()
    queues = {kind: list(items) for kind, items in media.items()}
    for turn in turns:
        role, pieces = _read_turn(turn, column)
        content: list[dict[str, Any]] = []
        for kind, text in pieces:
            if kind == "text":
                if text:
                    content.append({"type": "text", "text": text})
            elif kind not in queues:
                continue  # this kind is switched off
            elif not queues[kind]:
                raise SkipSample("bad_sample", f"more <{kind}> in the messages than there are {kind}s")
            else:
                show_media(conversation, content, kind, [queues[kind].pop(0)])
        conversation.messages.append({"role": role, "content": content or [{"type": "text", "text": ""}]})
    _place_unmarked(conversation, queues)
    if conversation.messages[-1]["role"] != "assistant":
        raise SkipSample("bad_sample", "the last message is not the assistant's")
    return conversation


def parse_turns(value: Any) -> list[Any] | None:
    """Return the turns of a conversation, also of one that is stored as JSON text; None where it is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return list(value) if isinstance(value, list | tuple) and value else None


def part_kind(part: Mapping[str, Any]) -> str | None:
    """Say what a part of a content list is: "text", "image", "video", or None for anything else."""
    return _PART_KINDS.get(str(part.get("type")))


def part_reference(part: Mapping[str, Any]) -> Any:
    """Return what a part of kind image or video says of its own file (a path, a URL, bytes); None for a placeholder."""
    for name in ("image", "image_url", "video", "video_url", "url", "path", "bytes"):
        value = part.get(name)
        if isinstance(value, Mapping):
            value = next((value[key] for key in ("bytes", "path", "url") if value.get(key) is not None), None)
        if value is not None:
            return value
    return None


def _read_turn(turn: Any, column: str) -> tuple[str, list[tuple[str, str]]]:
    """Return a turn's role, and its texts and placeholders as (kind, text)."""
    if isinstance(turn, Mapping):
        role = _ROLES.get(str(turn.get("role", turn.get("from"))))
        content = turn.get("content", turn.get("value"))
        if role is not None and isinstance(content, str):
            return role, _split_markers(content)
        if role is not None and isinstance(content, list | tuple):
            return role, [piece for part in content for piece in _read_part(part, column)]
    raise SkipSample(
        "bad_sample",
        f"column {column!r} has a message that is not {{role: user | assistant | system, content: text or parts}}",
    )


def _read_part(part: Any, column: str) -> list[tuple[str, str]]:
    if isinstance(part, str):
        return _split_markers(part)
    kind = part_kind(part) if isinstance(part, Mapping) else None
    if kind is None or (kind == "text" and not isinstance(part.get("text"), str)):
        raise SkipSample(
            "bad_sample", f"column {column!r} has a part that is not {{type: text | image | image_url | video}}"
        )
    if kind == "text":
        return _split_markers(part["text"])
    if part_reference(part) is not None:
        raise SkipSample(
            "bad_sample",
            f"column {column!r} names the file of its {kind} inside the message; "
            "`vlm-dist shards build` writes such data into shards that can be trained from",
        )
    return [(kind, "")]


def _split_markers(text: str) -> list[tuple[str, str]]:
    pieces = _MARKER.split(text)  # text, kind, text, kind, text
    return [("text", piece) if i % 2 == 0 else (piece, "") for i, piece in enumerate(pieces)]


def _place_unmarked(conversation: Conversation, queues: Mapping[str, list[bytes]]) -> None:
    """Media without any marker go before the first words of the user; some marked and some not is an error."""
    for kind, items in queues.items():
        shown = conversation.images if kind == "image" else conversation.videos
        if not items:
            continue
        if shown:
            raise SkipSample(
                "bad_sample", f"{len(shown)} <{kind}> in the messages, but {len(shown) + len(items)} {kind}s"
            )
        first = next((message for message in conversation.messages if message["role"] == "user"), None)
        if first is None:
            raise SkipSample("bad_sample", "the conversation has no turn of the user")
        first["content"][:0] = [{"type": kind} for _ in items]
        shown.extend(items)
