"""Answers are found exactly, with their terminators, in any text, and labels follow label_masking."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.samples import collator
from vlm_dist.data.encoding.encode import Encoder
from vlm_dist.data.encoding.labels import Renderer, answer_tokens, make_labels
from vlm_dist.data.types import IGNORE_INDEX
from vlm_dist.errors import SkipSample
from vlm_dist.families import family_for

QWEN = family_for("qwen2_vl")


def chat(*texts):
    return [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(texts)
    ]


def spoken(rendered):
    return [rendered.text[start:end] for start, end in rendered.answers]


def test_answers_with_their_terminators(processor):
    rendered = Renderer(processor, QWEN).render(chat("what is a cat", "a cat", "a cat?", "cat"))
    assert spoken(rendered) == ["a cat<|im_end|>", "cat<|im_end|>"]
    assert rendered.text.endswith("<|im_start|>assistant\ncat<|im_end|>\n")


def test_a_template_without_terminators_gets_them(processor):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'][0]['text'] }}\n{% endfor %}"
    renderer = Renderer(processor, QWEN)
    renderer._template = template
    rendered = renderer.render(chat("q", "a", "q", "b"))
    assert rendered.text == "user: q\nassistant: a<|im_end|>\nuser: q\nassistant: b<|im_end|>\n"
    assert spoken(rendered) == ["a<|im_end|>", "b<|im_end|>"]


def test_a_template_that_trims_or_changes_answers(processor):
    renderer = Renderer(processor, QWEN)
    renderer._template = "{% for m in messages %}{{ m['content'][0]['text'] | trim }}<|im_end|>{% endfor %}"
    assert spoken(renderer.render(chat("q", "  a b \n"))) == ["a b<|im_end|>"]
    renderer._template = "{% for m in messages %}{{ m['content'][0]['text'] | length }}<|im_end|>{% endfor %}"
    with pytest.raises(SkipSample, match="changes the answers"):
        renderer.render(chat("q", "a"))


def test_a_placeholder_token_in_the_words_of_a_sample_is_refused(processor):
    with pytest.raises(SkipSample, match="image_pad"):
        Renderer(processor, QWEN).render(chat("what is <|image_pad|>", "nothing"))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda text: "<|" not in text)


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_whatever_is_said_the_targets_are_the_answers(turns):
    processor, renderer, encoder = _qwen()
    rendered = renderer.render(chat(*(text for turn in turns for text in turn)))
    assert spoken(rendered) == [answer + "<|im_end|>" for _, answer in turns]
    encoded = encoder.encode(rendered)
    ids = encoded.tokens["input_ids"]
    assert processor.tokenizer.decode(ids[encoded.answers]) == processor.tokenizer.decode(
        processor.tokenizer("".join(answer + "<|im_end|>" for _, answer in turns)).input_ids
    )


_CACHE = []


def _qwen():
    """Not a fixture: hypothesis does not want to reset one."""
    if not _CACHE:
        from vlm_dist.demo.tiny_model import TinyShape, build_processor

        processor = build_processor(TinyShape())
        _CACHE.append((processor, Renderer(processor, QWEN), Encoder(processor, QWEN)))
    return _CACHE[0]


def test_tokens_that_share_a_character_with_an_answer_belong_to_it():
    offsets = [(0, 0), (0, 3), (3, 5), (5, 6), (6, 9)]
    assert answer_tokens(offsets, [(4, 6)]).tolist() == [False, False, True, True, False]
    assert answer_tokens(offsets, []).tolist() == [False] * 5


IDS = torch.tensor([5, 6, 7, 8, 9])
ANSWERS = torch.tensor([False, False, False, True, True])
VISUAL = torch.tensor([False, True, False, False, False])


@pytest.mark.parametrize(
    ("masking", "expected"),
    [
        ({}, [IGNORE_INDEX, IGNORE_INDEX, 7, 8, 9]),
        ({"mask_input_tokens": True}, [IGNORE_INDEX] * 3 + [8, 9]),
        ({"mask_image_token": False}, [IGNORE_INDEX, 6, 7, 8, 9]),
    ],
)
def test_label_masking(masking, expected):
    config = collator(label_masking=masking)
    assert make_labels(IDS, ANSWERS, VISUAL, config.label_masking).tolist() == expected
