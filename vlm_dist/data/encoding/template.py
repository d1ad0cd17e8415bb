"""From the columns of a sample to chat messages, with its images and videos in the order of their placeholders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_dist.config.message_variables import fill_variables, variables_in
from vlm_dist.config.vlm_collator import Message, MessageFormat
from vlm_dist.data.encoding.conversation import Conversation, read_conversation, show_media
from vlm_dist.errors import ConfigError, SkipSample

#: Key of dataset_columns whose column holds whole conversations, in the place of `training_messages`.
MESSAGES_COLUMN = "messages_column"


class MessageBuilder:
    """Fills `training_messages` with a sample's columns, or reads the conversation that the sample holds itself.

    A placeholder whose kind is switched off stands for the other kind where that one has no placeholder of its own.
    Several images in one column take the placeholders one by one; what is left goes to the last of them. Where a sample
    has no image (null, or an empty list), its placeholder is left out.

    Args:
        columns: variable -> column (`dataset_columns`), with `messages_column` for conversations.
        message_format: the user's messages.
        kinds: what is read: "image", "video".

    Raises:
        ConfigError: nothing shows a kind that is switched on, or a variable has no column.
    """

    def __init__(self, columns: Mapping[str, str], message_format: MessageFormat, kinds: frozenset[str]) -> None:
        self._media_columns = {kind: columns[f"{kind}_column"] for kind in sorted(kinds) if f"{kind}_column" in columns}
        self._messages_column = columns.get(MESSAGES_COLUMN)
        self._messages: tuple[Message, ...] = message_format.training_messages
        self._system_prompt = message_format.system_prompt
        self.text_columns: dict[str, str] = {}  # variable -> column, of the variables in use
        self.answer_columns: frozenset[str] = frozenset()  # that the last turn of the assistant alone has
        if self._messages_column is not None:
            self.text_columns = {MESSAGES_COLUMN: self._messages_column}
            return
        used = {
            name for message in self._messages for part in message.content for name in variables_in(part.text or "")
        }
        unknown = sorted(used - set(columns) - {"system_prompt"})
        if unknown:
            names = ", ".join("{" + name + "}" for name in unknown)
            raise ConfigError(f"message_format uses {names}, which dataset_columns does not have")
        self.text_columns = {name: columns[name] for name in sorted(used - {"system_prompt"})}
        self.answer_columns = self._find_answer_columns()
        self._shown_by = self._assign_placeholders()

    @property
    def media_columns(self) -> dict[str, str]:
        """Kind -> column, of the kinds that are read."""
        return dict(self._media_columns)

    def _assign_placeholders(self) -> dict[str, str]:
        """Kind of media -> the type of the placeholders that show it."""
        there = {part.type for message in self._messages for part in message.content if part.type != "text"}
        shown_by: dict[str, str] = {}
        for kind in self._media_columns:
            other = "video" if kind == "image" else "image"
            placeholder = kind if kind in there else other
            if placeholder not in there:
                switch = f"data_processing.{kind}_data"
                raise ConfigError(f"{switch} is on, but message_format.training_messages has no {{type: {kind}}} part")
            shown_by[kind] = placeholder
        return shown_by

    def _find_answer_columns(self) -> frozenset[str]:
        used = [
            {name for part in message.content for name in variables_in(part.text or "")} for message in self._messages
        ]
        last = max((i for i, message in enumerate(self._messages) if message.role == "assistant"), default=None)
        if last is None:
            return frozenset()
        elsewhere = {name for i, names in enumerate(used) if i != last for name in names}
        return frozenset(self.text_columns[name] for name in used[last] - elsewhere if name in self.text_columns)

    def each_answer(self, fields: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """A sample once for each of its answers, where the column of the answer has a list of them; each of them once.

        Answers are texts or numbers, or mappings with an `answer`, as in VQAv2.
        """
        for column in sorted(self.answer_columns):
            value = fields.get(column)
            if isinstance(value, list | tuple) and len(value) > 0:
                plain = [one.get("answer") if isinstance(one, Mapping) else one for one in value]
                return [{**fields, column: one} for i, one in enumerate(plain) if one not in plain[:i]]
        return [fields]

    def empty_fields(self) -> dict[str, Any]:
        """The columns of a sample that says nothing and shows nothing."""
        if self._messages_column is not None:
            return {self._messages_column: [{"role": role, "content": ""} for role in ("user", "assistant")]}
        return dict.fromkeys(self.text_columns.values(), "")

    def build(self, fields: Mapping[str, Any]) -> Conversation:
        """Make the conversation of one sample.

        Raises:
            SkipSample: ("bad_sample") a column is missing or not what it should be.
        """
        media = self._read_media(fields)
        if self._messages_column is not None:
            return read_conversation(fields.get(self._messages_column), self._messages_column, media)
        values = {name: _as_text(fields, column) for name, column in self.text_columns.items()}
        values["system_prompt"] = self._system_prompt or ""
        places: list[str] = [part.type for message in self._messages for part in message.content]
        left = {kind: places.count(placeholder) for kind, placeholder in self._shown_by.items()}
        queues = {kind: list(items) for kind, items in media.items()}
        conversation = Conversation()
        for message in self._messages:
            content: list[dict[str, Any]] = []
            for part in message.content:
                if part.type == "text":
                    content.append({"type": "text", "text": fill_variables(part.text or "", values)})
                    continue
                for kind, placeholder in self._shown_by.items():
                    if placeholder == part.type:
                        left[kind] -= 1
                        count = min(1, len(queues[kind])) if left[kind] else len(queues[kind])
                        show_media(conversation, content, kind, [queues[kind].pop(0) for _ in range(count)])
            conversation.messages.append({"role": message.role, "content": content})
        return conversation

    def _read_media(self, fields: Mapping[str, Any]) -> dict[str, list[bytes]]:
        # Absent is the same as null: a tar cannot say null, and a sample without media is a sample of text.
        return {kind: _as_media(fields.get(column), column) for kind, column in self._media_columns.items()}


def _as_media(value: Any, column: str) -> list[bytes]:
    """Read a media column: bytes, or a list of them; sources have read what lies in files."""
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [item for element in value for item in _as_media(element, column)]
    if isinstance(value, bytes | bytearray | memoryview):
        return [value if isinstance(value, bytes) else bytes(value)]  # bytes with a name keep it
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    raise SkipSample(
        "bad_sample",
        f"column {column!r} has {type(value).__name__} {shown}, expected the bytes of an image or video",
    )


def _as_text(fields: Mapping[str, Any], column: str) -> str:
    """Read a text column; numbers are written out, a list of one text is that text."""
    if column not in fields:
        raise SkipSample("bad_sample", f"the sample has no {column!r}")
    value = fields[column]
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return str(value)
    kind = "null" if value is None else type(value).__name__
    several = "; several answers are for evaluation alone" if isinstance(value, list | tuple) and value else ""
    raise SkipSample("bad_sample", f"column {column!r} is {kind}, expected a text{several}")
