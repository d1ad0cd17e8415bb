"""The lines of data_config.yaml and vlm_collator_config.yaml with which a shard set trains."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from vlm_dist.config.vlm_collator import DatasetColumns
from vlm_dist.data.index.facts import member_kind

_QUESTIONS = ("question", "query", "prompt", "instruction", "input", "problem", "user")
_ANSWERS = (
    "answer",
    "response",
    "output",
    "answers",
    "label",
    "caption",
    "text",
    "completion",
    "solution",
    "assistant",
)


def config_lines(path: Path | str, columns: Sequence[str], messages_column: str | None) -> str:
    """Write what to put into the two files: what differs from their defaults.

    Args:
        path: directory or glob of the shards.
        columns: that the shards have when they are read.
        messages_column: column of conversations, if there is one.

    Returns:
        YAML with the sections `data` and `collator`, as a run file's `overrides` takes them.
    """
    lines = [
        "data: # configs/data_config.yaml",
        "    train:",
        "        - type: tar",
        f"          path: {_quoted(str(path))}",
    ]
    images, videos = _media(columns, "image"), _media(columns, "video")
    wanted, remarks = _dataset_columns(columns, messages_column, images, videos)
    section = [f"        {key}: {_quoted(value)}" for key, value in wanted.items()]
    section += [f"        # {remark}" for remark in remarks]
    collator = ["    dataset_columns:", *section] if section else []
    if videos or not images:
        collator += ["    data_processing:", f"        image_data: {str(bool(images)).lower()}"]
        collator += [f"        video_data: {str(bool(videos)).lower()}"]
    if not images and not videos and messages_column is None:
        collator += _TEXT_MESSAGES
    if images and videos and messages_column is None:
        remarks_both = "# message_format.training_messages shows both kinds in the place of {type: image}"
        collator += [f"    {remarks_both}"]
    if collator:
        lines += ["collator: # configs/vlm_collator_config.yaml", *collator]
    return "\n".join(lines) + "\n"


_TEXT_MESSAGES = [
    "    message_format:",
    "        training_messages:",
    "            - role: user",
    '              content: [{type: text, text: "{question_column}"}]',
    "            - role: assistant",
    '              content: [{type: text, text: "{answer_column}"}]',
]


def _dataset_columns(
    columns: Sequence[str], messages_column: str | None, images: str | None, videos: str | None
) -> tuple[dict[str, str], list[str]]:
    defaults = DatasetColumns()
    found = {"image_column": images, "video_column": videos}
    remarks = []
    if messages_column is not None:
        found["messages_column"] = messages_column
    else:
        taken = {images, videos}
        for key, names in (("question_column", _QUESTIONS), ("answer_column", _ANSWERS)):
            found[key] = next((name for name in names if name in columns and name not in taken), None)
            if found[key] is None:
                remarks.append(f"{key}: name one of: {', '.join(name for name in columns if name not in taken)}")
    default = defaults.model_dump()
    return {key: value for key, value in found.items() if value is not None and value != default[key]}, remarks


def _media(columns: Collection[str], kind: str) -> str | None:
    """Name the column that holds a kind: the one of its name, else members of that kind."""
    if kind in columns:
        return kind
    members = [column for column in columns if column.rsplit(".", 1)[-1] == column and member_kind(column) == kind]
    named = [column for column in columns if "." in column and member_kind(column) == kind]
    return ";".join(sorted(members)) or (named[0] if named else None)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
