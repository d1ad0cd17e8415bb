"""From columns to chat messages: variables, placeholders and the media behind them."""

import pytest

from tests.unit.data.samples import collator
from vlm_dist.data.encoding.template import MessageBuilder
from vlm_dist.errors import ConfigError, SkipSample

BOTH = frozenset({"image", "video"})
IMAGE, VIDEO = frozenset({"image"}), frozenset({"video"})


def builder(kinds, columns=None, **message_format):
    config = collator(dataset_columns=columns or {}, message_format=message_format)
    return MessageBuilder(config.dataset_columns.mapping, config.message_format, kinds)


def parts(conversation):
    """One word per part: the text, or the kind."""
    return [part.get("text", f"<{part['type']}>") for message in conversation.messages for part in message["content"]]


def messages(*user):
    content = [{"type": one} if one in BOTH else {"type": "text", "text": one} for one in user]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "{answer_column}"}]}
    return [{"role": "user", "content": content}, answer]


def test_the_default_messages():
    conversation = builder(IMAGE).build({"image": b"i", "question": "q?", "answer": "a"})
    assert parts(conversation) == ["Answer briefly.", "<image>", "q?", "a"]
    assert conversation.images == [b"i"]


def test_columns_and_variables_of_the_users_own():
    made = builder(
        IMAGE,
        {"image_column": "image_path", "question_column": "query", "answer_column": "response", "hint_column": "hint"},
        training_messages=messages("image", "{hint_column}: {question_column} {{literal}}"),
    )
    conversation = made.build({"image_path": b"i", "query": "{hint_column}", "response": 42, "hint": 1.5})
    assert parts(conversation) == ["<image>", "1.5: {hint_column} {literal}", "42"]


@pytest.mark.parametrize(
    ("images", "placeholders", "expected"),
    [
        ([b"1", b"2", b"3"], ["image", "x"], ["<image>", "<image>", "<image>", "x"]),
        ([b"1", b"2"], ["image", "x", "image"], ["<image>", "x", "<image>"]),
        ([b"1", b"2", b"3"], ["image", "x", "image"], ["<image>", "x", "<image>", "<image>"]),
        ([b"1"], ["image", "x", "image"], ["<image>", "x"]),
        (None, ["image", "x"], ["x"]),
        ([], ["image", "x"], ["x"]),
    ],
)
def test_several_images_take_the_placeholders_one_by_one(images, placeholders, expected):
    made = builder(IMAGE, training_messages=messages(*placeholders))
    conversation = made.build({"image": images, "answer": "a"})
    assert parts(conversation) == [*expected, "a"]
    assert conversation.images == (images or [])


def test_switched_to_videos_the_image_placeholder_shows_the_video():
    conversation = builder(VIDEO).build({"image": b"i", "video": b"v", "question": "q", "answer": "a"})
    assert parts(conversation) == ["Answer briefly.", "<video>", "q", "a"]
    assert (conversation.images, conversation.videos) == ([], [b"v"])


def test_a_placeholder_of_its_own_is_not_taken_over():
    made = builder(VIDEO, training_messages=messages("image", "video", "q"))
    assert parts(made.build({"video": b"v", "answer": "a"})) == ["<video>", "q", "a"]
    both = builder(BOTH, training_messages=messages("video", "q", "image"))
    assert parts(both.build({"image": b"i", "video": b"v", "answer": "a"})) == ["<video>", "q", "<image>", "a"]
    assert parts(both.build({"image": b"i", "answer": "a"})) == ["q", "<image>", "a"]


@pytest.mark.parametrize("media", [{}, {"image": None}])
def test_a_sample_without_media_is_a_sample_of_text(media):
    conversation = builder(IMAGE).build({"question": "q", "answer": "a", **media})
    assert (parts(conversation), conversation.images) == (["Answer briefly.", "q", "a"], [])


def test_both_kinds_at_one_placeholder():
    made = builder(BOTH)
    conversation = made.build({"image": b"i", "video": b"v", "question": "q", "answer": "a"})
    assert parts(conversation) == ["Answer briefly.", "<image>", "<video>", "q", "a"]


def test_a_kind_that_nothing_shows_is_an_error_of_the_config():
    with pytest.raises(ConfigError, match=r"image_data is on, but .* no \{type: image\}"):
        builder(IMAGE, training_messages=messages("q"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image": b"i", "question": None, "answer": "a"}, "'question' is null"),
        ({"image": b"i", "answer": "a"}, "no 'question'"),
        ({"image": "somewhere.jpg", "question": "q", "answer": "a"}, "'image' has str 'somewhere.jpg'"),
        ({"image": b"i", "question": {"a": 1}, "answer": "a"}, "'question' is dict"),
    ],
)
def test_a_sample_that_is_not_what_it_should_be_is_skipped(fields, said):
    with pytest.raises(SkipSample, match=said) as caught:
        builder(IMAGE).build(fields)
    assert caught.value.null_class == "bad_sample"


SHARE_GPT = {"image_column": "images", "video_column": "videos", "messages_column": "messages"}


def talk(*texts, keys=("role", "content"), roles=("user", "assistant")):
    return [{keys[0]: roles[i % 2], keys[1]: text} for i, text in enumerate(texts)]


def test_conversations_show_their_media_where_they_say():
    turns = talk("<image>Who?", "They.", "Doing what?<image>", "Nothing.")
    conversation = builder(BOTH, SHARE_GPT).build({"messages": turns, "images": [b"1", b"2"]})
    assert parts(conversation) == ["<image>", "Who?", "They.", "Doing what?", "<image>", "Nothing."]
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert conversation.images == [b"1", b"2"]
    before, answer = conversation.prompt()
    assert answer == "Nothing."
    assert parts(before) == ["<image>", "Who?", "They.", "Doing what?", "<image>"]


def test_the_other_spelling_of_conversations_and_media_without_markers():
    turns = talk("Why?", "So.", keys=("from", "value"), roles=("human", "gpt"))
    conversation = builder(BOTH, SHARE_GPT).build({"messages": turns, "videos": b"v"})
    assert parts(conversation) == ["<video>", "Why?", "So."]


def test_markers_of_a_kind_that_is_off_are_left_out():
    conversation = builder(VIDEO, SHARE_GPT).build({"messages": talk("<image><video>q", "a"), "videos": [b"v"]})
    assert parts(conversation) == ["<video>", "q", "a"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": talk("<image>q", "a"), "images": []}, "more <image>"),
        ({"messages": talk("<image>q", "a"), "images": [b"1", b"2"]}, "1 <image> in the messages, but 2 images"),
        ({"messages": talk("q"), "images": []}, "not the assistant's"),
        ({"messages": "nonsense", "images": []}, "no list of messages"),
        ({"messages": [{"role": "robot", "content": "q"}], "images": []}, "user | assistant"),
    ],
)
def test_broken_conversations_are_skipped(fields, said):
    with pytest.raises(SkipSample, match=said):
        builder(IMAGE, SHARE_GPT).build(fields)
