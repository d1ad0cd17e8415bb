"""Conversations in the forms in which people publish them."""

import pytest

from vlm_dist.data.encoding.conversation import read_conversation
from vlm_dist.errors import SkipSample

IMAGE = {"type": "image"}
MEDIA = {"image": [b"1", b"2"], "video": [b"v"]}


def parts(conversation):
    return [part.get("text", f"<{part['type']}>") for message in conversation.messages for part in message["content"]]


def openai(*content, answer="a"):
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]


def text(words):
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (openai(IMAGE, text("x"), IMAGE, {"type": "video"}), ["<image>", "x", "<image>", "<video>", "a"]),
        (openai({"type": "image_url", "text": None}, IMAGE, {"type": "video"}, text("x")), None),
        (openai("<image><image><video>", text("x")), ["<image>", "<image>", "<video>", "x", "a"]),
        (openai(text("<video>x<image>y<image>")), ["<video>", "x", "<image>", "y", "<image>", "a"]),
        (openai(text("x"), answer=[{"type": "output_text", "text": "a"}]), ["<video>", "<image>", "<image>", "x", "a"]),
        ([{"from": "human", "value": "<image><image><video>x"}, {"from": "gpt", "value": "a"}], None),
        ('[{"from": "human", "value": "<image><image><video>x"}, {"from": "bot", "value": "a"}]', None),
    ],
)
def test_forms(turns, expected):
    conversation = read_conversation(turns, "messages", MEDIA)
    assert parts(conversation) == (expected or ["<image>", "<image>", "<video>", "x", "a"])
    assert (conversation.images, conversation.videos) == ([b"1", b"2"], [b"v"])


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        (openai({"type": "image", "image": "a.jpg"}, text("x")), "vlm-dist shards build"),
        (
            openai({"type": "image_url", "image_url": {"url": "https://x.org/a.jpg"}}, text("x")),
            "vlm-dist shards build",
        ),
        (openai({"type": "audio"}, text("x")), "part that is not"),
        (openai({"type": "text", "text": None}), "part that is not"),
        (openai(7), "part that is not"),
        ([{"role": "tool", "content": "x"}], "message that is not"),
        (openai(IMAGE, text("x")), "1 <image> in the messages, but 2 images"),
    ],
)
def test_what_cannot_be_read_is_skipped_with_a_reason(turns, said):
    with pytest.raises(SkipSample, match=said):
        read_conversation(turns, "messages", MEDIA)
