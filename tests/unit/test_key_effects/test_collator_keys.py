"""vlm_collator_config.yaml: each key changes the micro-batch that the model gets."""

from __future__ import annotations

import logging
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.test_key_effects.conftest import ANY_SIZE, BLUE, GREEN, RED, Project
from tests.unit.test_key_effects.registry import shows
from vlm_dist.data.encoding import preconditions
from vlm_dist.data.types import IGNORE_INDEX
from vlm_dist.demo.digits import encode_clip
from vlm_dist.errors import ConfigError, DataError

IMAGES_ONLY = {"collator.data_processing.video_data": False}
VIDEOS_ONLY = {"collator.data_processing.image_data": False}
MESSAGES = "collator.message_format.training_messages"
ASKED = {"type": "text", "text": "{question_column}"}
ANSWERED = {"role": "assistant", "content": [{"type": "text", "text": "{answer_column}"}]}


def user(*content: dict[str, str]) -> list[Any]:
    return [{"role": "user", "content": list(content)}, ANSWERED]


@shows(
    "collator.dataset_columns.image_column",
    "collator.dataset_columns.question_column",
    "collator.dataset_columns.answer_column",
)
def test_columns_are_those_that_are_named(project: Project) -> None:
    row = {"image": project.picture("red.png", RED), "question": "one", "answer": "two"}
    other = {"picture": project.picture("blue.png", BLUE), "query": "three", "response": "four"}
    rows = IMAGES_ONLY | project.rows(row | other)
    plain = project.batch(rows)
    names = {"image_column": "picture", "question_column": "query", "answer_column": "response"}
    renamed = project.batch(rows | {f"collator.dataset_columns.{key}": column for key, column in names.items()})
    assert "one" in plain.texts[0] and plain.learned[0].startswith("two")
    assert "three" in renamed.texts[0] and renamed.learned[0].startswith("four")
    assert plain.pixels().mean((0, 1)).argmax() == 0
    assert renamed.pixels().mean((0, 1)).argmax() == 2


@shows("collator.dataset_columns.video_column")
def test_the_video_column_is_the_one_that_is_named(project: Project) -> None:
    row = {"film": project.clip("white.mp4", 255), "video": project.clip("black.mp4", 0), "question": "", "answer": ""}
    rows = VIDEOS_ONLY | project.rows(row)
    film = project.batch(rows | {"collator.dataset_columns.video_column": "film"})
    assert film.pixels("video").mean() > 0.9
    assert project.batch(rows).pixels("video").mean() < 0.1


@shows("collator.dataset_columns.context_column", "collator.dataset_columns.*")
def test_context_and_columns_of_the_users_own_are_variables(project: Project) -> None:
    row = {"question": "Q", "answer": "A", "background": "it rains", "mood": "gloomy"}
    text = {"type": "text", "text": "{context_column} and {mood_column}: {question_column}"}
    changes = project.rows(row) | {
        "collator.data_processing": {"image_data": False, "video_data": False},
        "collator.dataset_columns.context_column": "background",
        "collator.dataset_columns.mood_column": "mood",
        MESSAGES: user(text),
    }
    assert "it rains and gloomy: Q" in project.batch(changes).texts[0]


@shows("collator.dataset_columns.messages_column")
def test_a_column_of_conversations_takes_the_place_of_the_messages(project: Project) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    turns += [{"from": "human", "value": "again"}, {"from": "gpt", "value": "and again"}]
    row = {"talk": turns, "question": "unused", "answer": "unused"}
    changes = project.rows(row) | {
        "collator.data_processing": {"image_data": False, "video_data": False},
        "collator.dataset_columns.messages_column": "talk",
    }
    batch = project.batch(changes)
    assert "unused" not in batch.texts[0]
    assert batch.learned == ["good day<|im_end|>and again<|im_end|>"]


@shows("collator.data_processing.image_data", "collator.data_processing.video_data")
def test_only_what_is_switched_on_is_read(project: Project) -> None:
    row = {"image": project.picture("x.png", RED), "video": project.clip("x.mp4", 9), "question": "", "answer": ""}
    keys = {"pixel_values", "pixel_values_videos"}
    for image, video, expected in (
        (True, False, {"pixel_values"}),
        (False, True, {"pixel_values_videos"}),
        (True, True, keys),
    ):
        switches = {"collator.data_processing": {"image_data": image, "video_data": video}}
        assert keys & set(project.batch(project.rows(row) | switches).made.inputs) == expected


@shows("collator.message_format.system_prompt")
def test_the_system_prompt_is_a_variable(project: Project) -> None:
    form = {MESSAGES: user({"type": "text", "text": "{system_prompt}"}, {"type": "image"})}
    batch = project.batch(IMAGES_ONLY | form | {"collator.message_format.system_prompt": "Be kind."})
    assert "user\nBe kind.<|vision_start|>" in batch.texts[0]


@shows(
    "collator.message_format.training_messages[].role",
    "collator.message_format.training_messages[].content[].type",
    "collator.message_format.training_messages[].content[].text",
)
def test_messages_are_rendered_as_they_are_written(project: Project) -> None:
    row = {"image": project.picture("x.png", RED), "question": "why", "answer": "so"}
    messages = [{"role": "system", "content": [{"type": "text", "text": "a rule"}]}]
    messages += user(
        {"type": "text", "text": "before "}, {"type": "image"}, {"type": "text", "text": " then {{a}}"}, ASKED
    )
    batch = project.batch(IMAGES_ONLY | project.rows(row) | {MESSAGES: messages})
    text = batch.texts[0].replace("<|image_pad|>", "")
    assert text == (
        "<|im_start|>system\na rule<|im_end|>\n"
        "<|im_start|>user\nbefore <|vision_start|><|vision_end|> then {a}why<|im_end|>\n"
        "<|im_start|>assistant\nso<|im_end|>\n"
    )


@shows("collator.image_processing.convert_to_rgb")
def test_sixteen_bits_are_scaled_with_convert_to_rgb(project: Project) -> None:
    Image.fromarray(np.full((56, 56), 2**15, dtype=np.uint16)).save(project.data / "grey.png")
    rows = IMAGES_ONLY | project.rows({"image": "grey.png", "question": "", "answer": ""})
    assert project.batch(rows).pixels().mean() == pytest.approx(0.5, abs=0.02)
    left = project.batch(rows | {"collator.image_processing.convert_to_rgb": False})
    assert left.pixels().mean() > 0.9  # the processor's own conversion clips


@shows("collator.image_processing.max_size", "collator.image_processing.resize_mode")
def test_max_size_and_the_way_to_get_there(project: Project) -> None:
    name = project.picture("wide.png", RED, GREEN, GREEN, BLUE, size=(224, 112))
    rows = IMAGES_ONLY | ANY_SIZE | project.rows({"image": name, "question": "", "answer": ""})
    size, mode = "collator.image_processing.max_size", "collator.image_processing.resize_mode"
    assert project.batch(rows).sizes() == [(224, 112)]
    assert project.batch(rows | {size: 112}).sizes() == [(112, 56)]  # keep_aspect is the default
    crop = project.batch(rows | {size: 112, mode: "crop"})
    stretch = project.batch(rows | {size: 112, mode: "stretch"})
    assert crop.sizes() == stretch.sizes() == [(112, 112)]
    assert crop.pixels()[..., 1].min() > 0.9  # the green centre alone
    assert {int(colour) for colour in stretch.pixels().mean(1).argmax(-1)} == {0, 1, 2}  # all of it


@shows("collator.video_processing.enabled")
def test_videos_cannot_be_read_where_they_are_not_enabled(project: Project) -> None:
    changes = {"collator.video_processing.enabled": False}
    with pytest.raises(ConfigError, match=r"got false beside data_processing\.video_data: true"):
        project.config(changes)
    project.config(changes | IMAGES_ONLY)  # nothing to enable


@shows("collator.video_processing.frame_extraction.library")
def test_the_library_that_is_named_reads_the_videos(
    project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = VIDEOS_ONLY | project.rows({"video": project.clip("x.mp4", 9), "question": "", "answer": ""})
    key = "collator.video_processing.frame_extraction.library"
    modules = {"decord": "decord", "cv2": "cv2", "pyav": "av"}
    usual = project.batch(rows).pixels("video")
    for name, module in modules.items():
        with monkeypatch.context() as patch:
            for other in modules.values():
                if other != module:
                    patch.setitem(sys.modules, other, None)
            torch.testing.assert_close(project.batch(rows | {key: name}).pixels("video"), usual)
            assert not project.batch(rows | {key: "auto"}).skipped
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ConfigError, match=rf"library is {name}, but \S+ is not installed; pip install"):
                project.batch(rows | {key: name})
    preconditions._tell_once.cache_clear()  # another test of this process may have been told
    with caplog.at_level(logging.INFO):
        project.batch(rows | {key: "auto"})
    assert "videos are read by the first of these that can open them: pyav" in caplog.text


@shows(
    "collator.video_processing.frame_extraction.num_frames",
    "collator.video_processing.frame_extraction.sampling_strategy",
)
def test_frames_are_spread_evenly(project: Project) -> None:
    rows = VIDEOS_ONLY | project.rows({"video": project.clip("x.mp4", 0, 60, 120, 180), "question": "", "answer": ""})
    key = "collator.video_processing.frame_extraction.num_frames"
    four, eight = (project.batch(rows | {key: count}) for count in (4, 8))
    assert [four.sizes("video")[0][0], eight.sizes("video")[0][0]] == [4, 8]
    greys = four.pixels("video").reshape(2, -1, 2, 3).mean((1, 3)).flatten() * 255
    torch.testing.assert_close(greys, torch.tensor([0.0, 60, 120, 180]), atol=6, rtol=0)  # one of each half second


@shows("collator.video_processing.file_processing.max_duration")
def test_only_the_first_seconds_are_looked_at(project: Project) -> None:
    rows = VIDEOS_ONLY | project.rows({"video": project.clip("x.mp4", 0, 0, 255, 255), "question": "", "answer": ""})
    assert project.batch(rows).pixels("video").max() > 0.9
    first = project.batch(rows | {"collator.video_processing.file_processing.max_duration": 1.0})
    assert first.pixels("video").max() < 0.1


@shows("collator.video_processing.file_processing.convert_to_rgb")
def test_colours_are_left_in_the_order_of_the_library(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    red = np.full((56, 56, 3), RED, dtype=np.uint8)
    (project.data / "red.mp4").write_bytes(encode_clip([red, red]))
    rows = VIDEOS_ONLY | project.rows({"video": "red.mp4", "question": "", "answer": ""})
    rows |= {"collator.video_processing.frame_extraction.library": "cv2"}
    key = "collator.video_processing.file_processing.convert_to_rgb"
    assert project.batch(rows).pixels("video").mean((0, 1)).argmax() == 0
    assert project.batch(rows | {key: False}).pixels("video").mean((0, 1)).argmax() == 2
    assert "blue and red exchanged" in caplog.text
    project.batch({key: False})
    assert "convert_to_rgb: false has no effect: decord gives RGB frames" in caplog.text


@shows("collator.text_processing.padding")
def test_without_padding_rows_must_be_equally_long(project: Project) -> None:
    rows = project.rows({"question": "a", "answer": "b"}, {"question": "a b c d e f", "answer": "b"})
    text = {"collator.data_processing": {"image_data": False, "video_data": False}, MESSAGES: user(ASKED)}
    made = project.batch(rows | text, samples=(0, 1)).made
    assert made.inputs["attention_mask"][0].min() == 0
    sizes = {"train.per_device_train_batch_size": 1, "train.per_device_eval_batch_size": 1}
    off = rows | text | {"collator.text_processing.padding": False}
    with pytest.raises(ConfigError, match=r"padding: got false, expected true"):
        project.config(off)
    assert project.batch(off | sizes).made.inputs["attention_mask"].min() == 1
    with pytest.raises(DataError, match="padding is false"):
        project.batch(off | sizes, samples=(0, 1))


@shows("collator.text_processing.padding")
def test_dummies_of_a_tower_are_no_hindrance_without_padding(project: Project) -> None:
    sizes = {"train.per_device_train_batch_size": 1, "train.per_device_eval_batch_size": 1}
    made = project.batch(sizes | {"collator.text_processing.padding": False}).made  # an image, and a dummy clip
    assert len(made.labels) == made.num_samples == 1
    assert len(made.inputs["video_grid_thw"]) == 1


@shows("collator.text_processing.pad_to_multiple_of")
def test_lengths_are_rounded_up(project: Project) -> None:
    rows = project.rows({"question": "a", "answer": "b"}, {"question": "a b c d e f", "answer": "b"})
    text = {"collator.data_processing": {"image_data": False, "video_data": False}, MESSAGES: user(ASKED)}
    key = "collator.text_processing.pad_to_multiple_of"
    length = project.batch(rows | text, samples=(0, 1)).made.labels.shape[1]
    rounded = project.batch(rows | text | {key: 50}, samples=(0, 1)).made
    assert rounded.labels.shape[1] == math.ceil(length / 50) * 50 != length
    assert rounded.inputs["attention_mask"][:, length:].max() == 0
    sizes = {"train.per_device_train_batch_size": 1, "train.per_device_eval_batch_size": 1}
    with pytest.raises(ConfigError, match=r"pad_to_multiple_of: got a number, expected null: padding is false"):
        project.config(rows | text | sizes | {key: 50, "collator.text_processing.padding": False})


@shows("collator.text_processing.max_length", "collator.text_processing.truncation")
def test_long_samples_are_cut_or_left_out(project: Project) -> None:
    rows = project.rows({"question": "short", "answer": "long " * 200})
    text = {"collator.data_processing": {"image_data": False, "video_data": False}, MESSAGES: user(ASKED)}
    cut = project.batch(rows | text | {"collator.text_processing.max_length": 64})
    assert cut.made.labels.shape[1] == 64 and cut.made.num_cut == 1
    whole = project.batch(rows | text | {"collator.text_processing.max_length": 4096})
    assert whole.made.labels.shape[1] > 200 and whole.made.num_cut == 0
    limits = {"collator.text_processing.max_length": 64, "collator.text_processing.truncation": False}
    left_out = project.batch(rows | text | limits)
    assert left_out.made.num_samples == 0
    assert "too_long" in left_out.skipped[0] and "truncation is off" in left_out.skipped[0]


@shows("collator.text_processing.add_generation_prompt")
def test_a_generation_prompt_begins_another_answer(project: Project) -> None:
    start = "<|im_start|>assistant\n"
    assert not project.batch(IMAGES_ONLY).texts[0].endswith(start)
    assert (
        project.batch(IMAGES_ONLY | {"collator.text_processing.add_generation_prompt": True}).texts[0].endswith(start)
    )


@shows("collator.label_masking.mask_input_tokens")
def test_masking_the_input_leaves_the_answer(project: Project) -> None:
    rows = IMAGES_ONLY | project.rows({"image": project.picture("x.png", RED), "question": "why", "answer": "so"})
    key = "collator.label_masking.mask_input_tokens"
    assert project.batch(rows | {key: True}).learned == ["so<|im_end|>"]
    learned = project.batch(rows | {key: False}).learned[0]
    assert "why" in learned and "so<|im_end|>" in learned


@shows("collator.label_masking.mask_image_token")
def test_image_tokens_carry_loss_only_where_they_are_not_masked(project: Project) -> None:
    rows = IMAGES_ONLY | {"collator.label_masking.mask_input_tokens": False}
    masked = project.batch(rows)
    assert "<|image_pad|>" in masked.texts[0] and "<|image_pad|>" not in masked.learned[0]
    learned = project.batch(rows | {"collator.label_masking.mask_image_token": False}).learned[0]
    assert learned.count("<|image_pad|>") == masked.texts[0].count("<|image_pad|>")


@shows("collator.label_masking.ignore_index")
def test_masked_tokens_have_the_label_that_is_named(project: Project) -> None:
    """That the loss knows it too is shown in a run."""
    usual = project.batch(samples=(0, 1)).made
    other = project.batch({"collator.label_masking.ignore_index": -7}, samples=(0, 1)).made
    assert torch.equal(other.labels == -7, usual.labels == IGNORE_INDEX) and (other.labels == -7).any()
    assert not (other.labels == IGNORE_INDEX).any()
    assert other.num_target_tokens == usual.num_target_tokens


@shows("collator.label_masking.mask_pad_token")
def test_padding_carries_loss_only_where_it_is_not_masked(project: Project) -> None:
    rows = project.rows({"question": "a", "answer": "b"}, {"question": "a b c d e f", "answer": "b"})
    rows |= {"collator.data_processing": {"image_data": False, "video_data": False}, MESSAGES: user(ASKED)}
    masked = project.batch(rows, samples=(0, 1)).made
    padding = masked.inputs["attention_mask"] == 0
    assert padding.any() and (masked.labels[padding] == IGNORE_INDEX).all()
    learned = project.batch(rows | {"collator.label_masking.mask_pad_token": False}, samples=(0, 1))
    assert (learned.made.labels[padding] == learned.processor.tokenizer.pad_token_id).all()
    assert learned.made.num_target_tokens == masked.num_target_tokens + int(padding.sum())
