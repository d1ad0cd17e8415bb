"""From the plan's slots to a micro-batch: what is read, masked, fitted and skipped, and what keeps its shape."""

import pickle

import pytest
import torch

from tests.unit.data.samples import MemorySource, collator, jpeg, mp4
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.media.named import NamedBytes
from vlm_dist.data.types import IGNORE_INDEX, MicroBatchJob, SampleRef
from vlm_dist.errors import ConfigError, DataError, ModelError
from vlm_dist.families import family_for

QWEN = family_for("qwen2_vl")
BOTH = frozenset({"image", "video"})
ANSWERS_ONLY = {"mask_input_tokens": True}
BOTH_ON = {"data_processing": {"image_data": True, "video_data": True}}

IMAGE, VIDEO, TEXT, CORRUPT, TWO, CUT, LONG = range(7)
ROWS = [
    {"image": jpeg(112, 84), "question": "which digit is this", "answer": "seven"},
    {"image": None, "video": mp4(), "question": "which digits", "answer": "one two"},
    {"image": None, "question": "what is in the image", "answer": "nothing"},
    None,  # damaged
    {"image": [jpeg(56, 56), jpeg(56, 112, 1)], "video": mp4(4), "question": "two?", "answer": "yes"},
    {"image": jpeg(112, 84)[:300], "question": "q", "answer": "a"},
    {"image": jpeg(560, 560), "question": "describe this image", "answer": "one two three four " * 40},
]


def materialiser(processor, towers=BOTH, rows=ROWS, for_generation=False, **sections):
    sections = {"label_masking": ANSWERS_ONLY, **BOTH_ON, **sections}
    return Materialiser([MemorySource(rows)], processor, QWEN, collator(**sections), towers, 0, for_generation)


def job(*rows):
    return MicroBatchJob(3, 1, tuple(None if row is None else SampleRef(0, row) for row in rows))


def targets(processor, batch):
    return [processor.tokenizer.decode(labels[labels != IGNORE_INDEX]) for labels in batch.labels]


def same(one, other):
    assert one.inputs.keys() == other.inputs.keys()
    assert all(torch.equal(one.inputs[key], other.inputs[key]) for key in one.inputs)
    assert torch.equal(one.labels, other.labels)
    return True


def test_samples_of_all_kinds_in_one_micro_batch(processor):
    batch = materialiser(processor)(job(IMAGE, VIDEO, TEXT, TWO))
    assert targets(processor, batch) == [f"{answer}<|im_end|>" for answer in ("seven", "one two", "nothing", "yes")]
    assert batch.inputs["image_grid_thw"].tolist() == [[1, 6, 8], [1, 4, 4], [1, 8, 4]]
    assert batch.inputs["video_grid_thw"].tolist() == [[4, 4, 4], [2, 4, 4]]
    assert batch.inputs["pixel_values"].shape == (48 + 16 + 32, 1176)
    assert batch.num_samples == 4
    assert batch.num_tokens == int(batch.inputs["attention_mask"].sum())
    assert batch.num_target_tokens == int((batch.labels != IGNORE_INDEX).sum())
    assert batch.num_computed_tokens == batch.labels.numel()
    assert (batch.labels[:, 0] == IGNORE_INDEX).all()
    assert [origin.key for origin in batch.origins] == ["0", "1", "2", "4"]
    assert batch.null_slots == []
    assert batch.references == []


def test_it_equals_the_processors_own_batch_call(processor):
    batch = materialiser(processor, frozenset({"image"}), data_processing={})(job(IMAGE, TEXT, IMAGE))
    asked = [
        ("which digit is this", "seven", 1),
        ("what is in the image", "nothing", 0),
        ("which digit is this", "seven", 1),
    ]
    texts = [
        processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "Answer briefly."},
                        *[{"type": "image"}] * num,
                        {"type": "text", "text": question},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        )
        for question, answer, num in asked
    ]
    from vlm_dist.data.media.images import decode_image

    image = decode_image(ROWS[IMAGE]["image"])
    expected = processor(text=texts, images=[image, image], padding=True, padding_side="right", return_tensors="pt")
    assert set(batch.inputs) == set(expected)
    for key, value in expected.items():
        assert torch.equal(batch.inputs[key], value), key


def test_without_masking_all_but_padding_and_pictures_carries_loss(processor):
    plain = materialiser(processor, label_masking={})(job(IMAGE, TEXT))
    ids, mask = plain.inputs["input_ids"], plain.inputs["attention_mask"].bool()
    visual = (ids == processor.image_token_id) | (ids == processor.video_token_id)
    expected = mask & ~visual
    expected[:, 0] = False
    length = materialiser(processor, frozenset(), label_masking={})(job(TEXT)).num_tokens
    expected[1, length:] = False  # the dummy clip, behind the shorter sample
    assert torch.equal(plain.labels != IGNORE_INDEX, expected)
    learned = materialiser(processor, label_masking={"mask_image_token": False, "mask_pad_token": False})(
        job(IMAGE, TEXT)
    )
    expected[0, 1:] = True
    expected[1, 1:length] = expected[1, ~mask[1]] = True
    assert torch.equal(learned.labels != IGNORE_INDEX, expected)
    assert (learned.labels == ids)[expected].all()


def test_empty_slots_keep_the_towers_at_work(processor):
    make = materialiser(processor)
    for batch in (make(job(CORRUPT, None, CUT)), make(job())):
        assert batch.inputs["image_grid_thw"].tolist() == [[1, 2, 2]]
        assert batch.inputs["video_grid_thw"].tolist() == [[1, 2, 2]]
        assert batch.num_samples == batch.num_target_tokens == batch.num_tokens == 0
        assert (batch.labels == IGNORE_INDEX).all()
        assert batch.inputs["input_ids"].shape == (1, batch.num_computed_tokens)
        assert batch.num_computed_tokens < 10
    slots = make(job(CORRUPT, None, CUT)).null_slots
    assert [slot.null_class for slot in slots] == ["bad_sample", "tail", "decode"]
    assert [str(slot.origin) for slot in slots] == ["memory/shard:3", "None", "memory/shard:5"]


def test_a_dummy_only_where_a_kind_is_missing_and_wanted(processor):
    make = materialiser(processor)
    assert make(job(TWO)).num_computed_tokens == make(job(TWO)).num_tokens
    batch = make(job(IMAGE, CORRUPT))
    assert batch.inputs["video_grid_thw"].tolist() == [[1, 2, 2]]
    assert batch.num_samples == 1
    assert batch.num_tokens < batch.num_computed_tokens < batch.num_tokens + 5
    assert (batch.labels[0, batch.num_tokens :] == IGNORE_INDEX).all()
    text_only = materialiser(processor, towers=frozenset())(job(TEXT))
    assert set(text_only.inputs) == {"input_ids", "attention_mask", "mm_token_type_ids"}


def test_one_broken_sample_moves_nothing_else(processor):
    make = materialiser(processor)
    with_it, without = make(job(IMAGE, CUT, VIDEO)), make(job(IMAGE, VIDEO))
    assert same(with_it, without)


def test_the_same_job_gives_the_same_bytes_in_another_process_image(processor):
    make = materialiser(processor)
    again = pickle.loads(pickle.dumps(make))
    state = torch.get_rng_state()
    assert same(make(job(IMAGE, VIDEO, LONG)), again(job(IMAGE, VIDEO, LONG)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("max_length", [1024, 400, 250, 120, 64])
def test_a_photograph_never_vanishes(processor, max_length):
    """It is made smaller until text and picture fit; visual tokens and their markers stay in agreement."""
    batch = materialiser(processor, text_processing={"max_length": max_length})(job(LONG))
    assert batch.null_slots == []
    assert batch.num_tokens <= max_length
    num_visual = int((batch.inputs["input_ids"] == processor.image_token_id).sum())
    assert num_visual == int(batch.inputs["image_grid_thw"].prod()) // 4
    assert batch.num_reduced == int(num_visual < 400)
    assert batch.num_target_tokens > 0


def test_room_is_used_and_the_text_is_only_cut_when_it_must_be(processor):
    full = materialiser(processor)(job(LONG))
    num_text = full.num_tokens - 400
    limit = num_text + 100
    batch = materialiser(processor, text_processing={"max_length": limit})(job(LONG))
    assert (batch.num_reduced, batch.num_cut) == (1, 0)
    assert batch.num_target_tokens == full.num_target_tokens
    assert 81 <= int(batch.inputs["image_grid_thw"].prod()) // 4 <= 100
    batch = materialiser(processor, text_processing={"max_length": num_text - 20})(job(LONG))
    assert (batch.num_reduced, batch.num_cut) == (1, 1)
    assert 0 < batch.num_target_tokens < full.num_target_tokens


def test_frames_go_when_resolution_is_not_enough(processor):
    rows = [{"video": mp4(32, width=280, height=280), "question": "q", "answer": "a"}]
    sections = {"video_processing": {"frame_extraction": {"num_frames": 32}}}
    grids = {}
    for limit in (2048, 200, 60):
        make = materialiser(processor, rows=rows, text_processing={"max_length": limit}, **sections)
        batch = make(job(0))
        assert batch.num_samples == 1, batch.null_slots
        assert batch.num_tokens <= limit
        grids[limit] = batch.inputs["video_grid_thw"][0].tolist()
    assert grids[2048] == [16, 20, 20]
    assert grids[200][0] == 16
    assert grids[60][0] < 16
    assert grids[60][1:] == [4, 4]  # the processor's min_pixels


def test_too_long_in_its_smallest_form(processor):
    batch = materialiser(processor, text_processing={"max_length": 16})(job(LONG))
    assert [slot.null_class for slot in batch.null_slots] == ["too_long"]
    assert "max_length is 16" in batch.null_slots[0].message


def test_without_truncation_nothing_is_made_to_fit(processor):
    make = materialiser(processor, text_processing={"max_length": 300, "truncation": False})
    batch = make(job(IMAGE, LONG))
    assert batch.num_samples == 1
    assert [slot.null_class for slot in batch.null_slots] == ["too_long"]
    assert batch.num_reduced == batch.num_cut == 0


def test_prompts_for_generation(processor):
    batch = materialiser(processor, for_generation=True)(job(IMAGE, CORRUPT, TEXT))
    assert batch.references == ["seven", "nothing"]
    texts = processor.tokenizer.batch_decode(batch.inputs["input_ids"])
    assert all(text.endswith("<|im_end|>\n<|im_start|>assistant\n") for text in texts[:2])
    assert "seven" not in texts[0]
    assert texts[1].startswith("<|endoftext|>")
    assert batch.inputs["attention_mask"][1, 0] == 0
    assert batch.inputs["attention_mask"][:, -1].all()
    assert (batch.labels == IGNORE_INDEX).all()


def test_of_several_answers_each_is_right_in_evaluation_alone(processor):
    """The loss is that of the first; a mapping is as in VQAv2; an answer that was given twice is one."""
    row = {"image": jpeg(56, 56), "question": "which digit is this", "answer": ["seven", "7", "seven"]}
    rows = [row, row | {"answer": [{"answer": 7, "confidence": "yes"}]}, row | {"answer": []}]
    prompts = materialiser(processor, rows=rows, for_generation=True)(job(0, 1, 2))
    assert (prompts.references, prompts.other_references) == (["seven", "7"], [("7",), ()])
    assert [slot.null_class for slot in prompts.null_slots] == ["bad_sample"]
    sections = {"label_masking": ANSWERS_ONLY, **BOTH_ON}
    held_out = Materialiser([MemorySource(rows)], processor, QWEN, collator(**sections), BOTH, 0, several_answers=True)
    assert targets(processor, held_out(job(0)))[0] == "seven<|im_end|>"
    (refused,) = materialiser(processor, rows=rows)(job(0)).null_slots
    assert refused.message == "column 'answer' is list, expected a text; several answers are for evaluation alone"


def test_add_generation_prompt_in_training(processor):
    make = materialiser(processor, frozenset(), text_processing={"add_generation_prompt": True})
    ids = make(job(TEXT)).inputs["input_ids"][0]
    assert processor.tokenizer.decode(ids).endswith("<|im_start|>assistant\n")


def test_missing_columns_are_all_told_before_training(processor):
    columns = {"image_column": "img", "question_column": "query"}
    with pytest.raises(ConfigError) as caught:
        materialiser(processor, dataset_columns=columns, data_processing={})
    text = str(caught.value)
    assert "dataset_columns.question_column: memory has no column 'query'; it has: image, video" in text
    assert "dataset_columns.image_column: no source has a column 'img'" in text


def test_storage_failures_are_not_blamed_on_a_sample(processor):
    make = materialiser(processor, rows=[DataError("disk is gone")])
    with pytest.raises(DataError, match="disk is gone"):
        make(job(0))


def test_a_picture_that_the_processor_refuses_is_skipped(processor):
    rows = [{"image": jpeg(2100, 4), "question": "q", "answer": "a"}]  # an aspect ratio above 200
    batch = materialiser(processor, rows=rows)(job(0))
    assert [slot.null_class for slot in batch.null_slots] == ["bad_sample"]
    assert "aspect ratio" in batch.null_slots[0].message


def test_conversations(processor):
    turns = [
        {"role": "user", "content": "<image>who?"},
        {"role": "assistant", "content": "they"},
        {"role": "user", "content": "what?<image>"},
        {"role": "assistant", "content": "nothing"},
    ]
    source = MemorySource(
        [{"images": [jpeg(56, 56), jpeg(56, 56, 1)], "messages": turns}], names=("images", "messages")
    )
    columns = {"image_column": "images", "question_column": None, "answer_column": None, "messages_column": "messages"}
    config = collator(dataset_columns=columns, label_masking=ANSWERS_ONLY)
    batch = Materialiser([source], processor, QWEN, config, frozenset({"image"}), 0)(job(0))
    assert targets(processor, batch) == ["they<|im_end|>nothing<|im_end|>"]
    assert batch.inputs["image_grid_thw"].shape == (2, 3)


def test_a_tokenizer_without_offsets_cannot_mask_prompts(processor):
    slow = pickle.loads(pickle.dumps(processor))
    type_without_offsets = type("Slow", (type(slow.tokenizer),), {"is_fast": False})
    slow.tokenizer.__class__ = type_without_offsets
    with pytest.raises(ModelError, match="set it to false, or use a fast tokenizer"):
        materialiser(slow)
    assert materialiser(slow, label_masking={})(job(IMAGE)).num_samples == 1


def test_an_error_of_decoding_names_the_file_of_a_record(processor):
    named = NamedBytes.of(b"<html>", "photos/a.png")
    rows = [{"image": media, "video": None, "question": "?", "answer": "!"} for media in (named, [named])]
    for slot in materialiser(processor, rows=rows)(job(0, 1)).null_slots:
        assert slot.message == "photos/a.png: cannot decode the image: it is in no known format"
