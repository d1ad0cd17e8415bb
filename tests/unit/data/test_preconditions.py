"""What is said before training where configuration and data do not fit."""

import logging

import pytest

from tests.unit.data.samples import MemorySource, collator
from vlm_dist.data.encoding import preconditions
from vlm_dist.data.encoding.template import MessageBuilder
from vlm_dist.errors import ConfigError


def builder(**columns):
    config = collator(dataset_columns=columns)
    return MessageBuilder(config.dataset_columns.mapping, config.message_format, frozenset(("image",)))


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_data_of_conversations_gets_a_hint(column):
    with pytest.raises(ConfigError) as refused:
        preconditions.check_columns(builder(), [MemorySource([{}], "talks", ("image", "id", column))])
    assert f"talks has a column {column!r}" in str(refused.value)
    assert f"dataset_columns.messages_column: {column!r}" in str(refused.value)


def test_other_data_gets_none():
    with pytest.raises(ConfigError) as refused:
        preconditions.check_columns(builder(), [MemorySource([{}], "qa", ("image", "query"))])
    assert "messages_column" not in str(refused.value)


def test_the_choice_of_libraries_is_told_once(caplog):
    preconditions._tell_once.cache_clear()
    config = collator(data_processing={"video_data": True}, video_processing={"frame_extraction": {"library": "auto"}})
    with caplog.at_level(logging.INFO):
        for _ in range(3):  # for training, evaluation and generation
            preconditions.choose_video_libraries(config)
    assert len([line for line in caplog.messages if "videos are read by" in line]) == 1
