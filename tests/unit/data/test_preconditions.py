"""What is said before training where configuration and data do not fit."""

import logging

import pytest

from tests.unit.data.samples import MemorySource, collator
from tests.unit.model.zoo import kind
from vlm_dist.data.encoding import preconditions
from vlm_dist.data.encoding.labels import Renderer
from vlm_dist.data.encoding.template import MessageBuilder
from vlm_dist.errors import ConfigError, ModelError
from vlm_dist.families import family_for
from vlm_dist.model import load_processor


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


def renderer(name, template=None):
    processor = load_processor(str(kind(name).directory), kind(name).entry)
    processor.chat_template = template
    processor.tokenizer.chat_template = None
    return Renderer(processor, family_for(name, type(processor).__name__))


def test_a_template_that_shows_no_media_is_refused():
    template = "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ p.text }}{% endfor %}\n{% endfor %}"
    without = renderer("qwen2_vl", template)
    with pytest.raises(ModelError, match="writes nothing in the place of an image"):
        preconditions.check_messages(without, builder(), ["image"])
    preconditions.check_messages(without, builder(), [])  # the data has none
    preconditions.check_messages(renderer("llava_next"), builder(), ["image"])


def test_the_substitute_for_a_missing_template_is_told(caplog):
    preconditions._tell_once.cache_clear()
    with caplog.at_level(logging.INFO):
        preconditions.check_messages(renderer("qwen2_vl"), builder(), ["image"])
    assert "no chat template: messages are written in the form of the family qwen2_vl" in caplog.text
