"""Conversations on their way into a shard: files named inside the messages become media of the sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_dist.data.encoding.conversation import parse_turns, part_kind, part_reference, read_conversation
from vlm_dist.data.shards.build.bad_records import BadRecord
from vlm_dist.errors import SkipSample

_NAMES = ("messages", "conversations", "conversation")


def is_conversation(column: str, value: Any) -> bool:
    """Whether a value is a list of turns, or the JSON of one."""
    if isinstance(value, str) and (column not in _NAMES or not value.lstrip().startswith("[")):
        return False
    turns = parse_turns(value)
    return bool(turns) and all(
        isinstance(turn, Mapping) and ("role" in turn or "from" in turn) and ("content" in turn or "value" in turn)
        for turn in turns or ()
    )


def extract_media(value: Any) -> tuple[Any, dict[str, list[Any]]]:
    """Take the files out of the messages, and leave placeholders.

    Args:
        value: the turns; also as JSON text, which is parsed.

    Returns:
        The turns with `{"type": "image"}` and `{"type": "video"}` in the place of parts that name a file, and the
        files by kind, in order. What is no conversation is returned as it is.
    """
    turns = parse_turns(value)
    if turns is None:
        return value, {}
    found: dict[str, list[Any]] = {}
    kept: list[Any] = []
    for turn in turns:
        name = next((name for name in ("content", "value") if isinstance(turn, Mapping) and name in turn), None)
        if name is None or not isinstance(turn[name], list | tuple):
            kept.append(turn)
            continue
        parts = [_without_file(part, found) if isinstance(part, Mapping) else part for part in turn[name]]
        kept.append({**turn, name: parts})
    return kept, found


def check_conversation(value: Any, column: str, counts: Mapping[str, int]) -> None:
    """Check that training can read a conversation.

    Args:
        value: the turns, with placeholders.
        column: that they come from.
        counts: kind -> number of media of the sample.

    Raises:
        BadRecord: ("conversation") saying what does not fit.
    """
    media: dict[str, list[Any]] = {kind: [b""] * counts.get(kind, 0) for kind in ("image", "video")}
    try:
        read_conversation(value, column, media)
    except SkipSample as error:
        raise BadRecord("conversation", error.message) from error


def _without_file(part: Mapping[str, Any], found: dict[str, list[Any]]) -> dict[str, Any]:
    kind = part_kind(part)
    if kind not in ("image", "video"):
        return {name: value for name, value in part.items() if value is not None}  # Arrow fills all parts up with null
    reference = part_reference(part)
    if reference is not None:
        found.setdefault(kind, []).append(reference)
    return {"type": kind}
