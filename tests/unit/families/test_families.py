"""The table of families, and one sample through the processor of each."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.data.samples import MemorySource, collator, jpeg, mp4
from tests.unit.families.zoo import CHECKPOINTS
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.types import IGNORE_INDEX, MicroBatchJob, SampleRef
from vlm_dist.demo.digits import encode_png
from vlm_dist.errors import ConfigError
from vlm_dist.families import FAMILIES, GENERIC, choose_family, family_for

ROWS = [
    {"image": jpeg(60, 40), "question": "What is it?", "answer": "noise"},
    {"image": None, "question": "And what is this?", "answer": "nothing"},
    {"image": [jpeg(30, 90), jpeg(20, 20)], "question": "Two?", "answer": "yes"},
    None,  # damaged
]


def materialiser(name, **options):
    family = family_for(name)
    config = collator(label_masking={"mask_input_tokens": True}, **options.pop("config", {}))
    made = CHECKPOINTS[name].build()[1]
    return made, Materialiser([MemorySource(ROWS)], made, family, config, frozenset({"image"}), 0, **options)


def job(*rows):
    return MicroBatchJob(0, 0, tuple(SampleRef(0, row) for row in rows))


def answers(processor, batch):
    return [processor.tokenizer.decode(labels[labels != IGNORE_INDEX]) for labels in batch.labels]


def test_rows_are_found_by_model_type():
    assert family_for("qwen2_vl").name == family_for("qwen2_5_vl").name == "qwen2_vl"
    assert family_for("something_new") is GENERIC
    assert family_for("llava").name == family_for("llava", "LlavaProcessor").name == "llava"
    assert family_for("llava", "PixtralProcessor").name == "pixtral"
    covered = [(model_type, family.processors) for family in FAMILIES for model_type in family.model_types]
    assert len(covered) == len(set(covered))


@pytest.mark.parametrize(
    ("name", "eos", "num_visual", "prompt"),
    [
        ("llava", "</s>", 4, "USER: <image><image><image><image>\nAnswer briefly. What is it? ASSISTANT: noise</s> "),
        ("paligemma", "<eos>", 4, "<image><image><image><image><bos>Answer briefly. What is it?\nnoise<eos>"),
    ],
)
def test_exactly_the_answers_carry_loss(name, eos, num_visual, prompt):
    processor, make = materialiser(name)
    batch = make(job(0, 1, 2))
    lead = " " if "ASSISTANT: " in prompt else ""  # the generation prompt ends before the space: the model says it
    assert answers(processor, batch) == [f"{lead}{answer}{eos}" for answer in ("noise", "nothing", "yes")]
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    assert processor.tokenizer.decode(ids[0][mask[0]]) == prompt
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (ids == image_id).sum(dim=1).tolist() == [num_visual, 0, 2 * num_visual]
    assert batch.inputs["pixel_values"].shape == (3, 3, 28, 28)
    assert batch.num_samples == 3
    assert batch.num_tokens == int(mask.sum())


@pytest.mark.parametrize("name", ["llava", "paligemma"])
def test_a_micro_batch_without_an_image_gets_one(name):
    _, make = materialiser(name)
    for batch, num_samples in ((make(job(1)), 1), (make(job(3)), 0), (make(job()), 0)):
        assert batch.inputs["pixel_values"].shape == (1, 3, 28, 28)
        assert batch.num_samples == num_samples
        rows = {"llava": 1, "paligemma": 2}[name]  # whose tokens also see those behind them
        assert batch.inputs["input_ids"].shape[0] == rows
        assert (batch.labels[num_samples:, batch.num_tokens :] == IGNORE_INDEX).all()


@pytest.mark.parametrize("name", ["llava", "paligemma"])
def test_prompts_for_generation_end_where_the_answer_begins(name):
    processor, make = materialiser(name, for_generation=True)
    batch = make(job(0, 1))
    ends = {"llava": "ASSISTANT:", "paligemma": "is it?\n"}
    texts = [processor.tokenizer.decode(row) for row in batch.inputs["input_ids"]]
    assert texts[0].endswith(ends[name])
    assert batch.references == ["noise", "nothing"]
    assert batch.inputs["attention_mask"][:, -1].all()
    assert not batch.inputs["attention_mask"].all()


@pytest.mark.parametrize("name", ["llava", "paligemma"])
def test_long_texts_are_cut_behind_the_image(name):
    processor, make = materialiser(name, config={"text_processing": {"max_length": 60}})
    batch = make(job(0, 2))
    ids = batch.inputs["input_ids"]
    assert ids.shape[1] <= 60
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert int((ids == image_id).sum()) % 4 == 0


def test_a_family_without_videos_says_so():
    with pytest.raises(ConfigError, match="family llava take no videos"):
        materialiser("llava", config={"data_processing": {"image_data": False, "video_data": True}})


def test_a_model_of_ones_own_names_the_family_that_it_is_like():
    like = choose_family("llava_next", "here", "my_model", "MyProcessor")
    assert like is family_for("llava_next")
    facts = {"like": "llava", "image_tokens": ["<img>"], "packing": None}
    own = choose_family(facts, "here", "my_model", "MyProcessor")
    assert own.image_tokens == ("<img>",) and own.packing is None
    assert own.fallback_template == family_for("llava").fallback_template
    by_type = choose_family({"min_frames": 4}, "here", "qwen3_vl", "Qwen3VLProcessor")
    assert (by_type.min_frames, by_type.packing) == (4, "mrope")


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ("lava", "there is no family 'lava'; did you mean 'llava'"),
        ({"like": "lava"}, "did you mean 'llava'"),
        ({"image_token": "<img>"}, "no 'image_token'; did you mean 'image_tokens'"),
        ({"packing": "always"}, "family.packing: got 'always'"),
        ({"name": "mine"}, "no 'name'"),
        ({"image_tokens": 5}, "family.image_tokens: got 5: expected a list"),
        ({"image_marker": "<image{m}>"}, r"family.image_marker: got '<image\{m\}>': \{m\} means nothing; \{n\} is"),
    ],
)
def test_what_a_family_cannot_be_is_told(own, said):
    with pytest.raises(ConfigError, match=said):
        choose_family(own, "model_classes.me", "my_model", "MyProcessor")


def test_a_row_of_another_model_is_refused():
    processor = CHECKPOINTS["llava"].build()[1]
    with pytest.raises(ConfigError, match=r"family qwen2_vl does not fit the processor: CLIP.* has no patch_size"):
        Materialiser([], processor, family_for("qwen2_vl"), collator(), frozenset({"image"}), 0)


def test_a_conversation_that_the_template_refuses_costs_itself():
    said = ("assistant", "noise"), ("user", "<image>What is it?"), ("assistant", "noise")
    turns = [{"role": role, "content": content} for role, content in said]
    columns = {"messages_column": "messages", "question_column": None, "answer_column": None}
    source = MemorySource([{"image": jpeg(60, 40), "messages": turns}], "talks", ("image", "messages"))
    processor = CHECKPOINTS["gemma3"].build()[1]
    config = collator(dataset_columns=columns)
    make = Materialiser([source], processor, family_for("gemma3"), config, frozenset({"image"}), 0)
    (slot,) = make(job(0)).null_slots
    assert slot.message.startswith(
        "the model's chat template refuses the conversation (roles: assistant, user, assistant): "
    )


@pytest.mark.parametrize("name", ["pixtral", "llava"])
@pytest.mark.parametrize("size", [(90, 3), (1, 90)])
def test_a_side_of_a_picture_is_never_taken_for_its_colours(name, size, caplog):
    thin = Image.effect_noise(size, 90).convert("RGB")
    wide = thin.resize(tuple(max(side, 5) for side in size), Image.Resampling.NEAREST)
    processor = CHECKPOINTS[name].build()[1]
    rows = [{"image": encode_png(np.array(picture)), "question": "?", "answer": "!"} for picture in (thin, wide)]
    make = Materialiser([MemorySource(rows)], processor, family_for(name), collator(), frozenset({"image"}), 0)
    first, second = (make(job(row)).inputs["pixel_values"] for row in (0, 1))
    assert torch.equal(first, second)
    assert "ambiguous" not in caplog.text


def test_a_clip_that_is_shorter_than_its_file_says_costs_itself_where_clips_must_be_of_one_length():
    short = {"video": mp4(num_frames=2), "question": "q", "answer": "short"}
    rows = [{"video": mp4(num_frames=8), "question": "q", "answer": f"{i}"} for i in range(2)]
    config = collator(
        data_processing={"image_data": False, "video_data": True},
        video_processing={"frame_extraction": {"num_frames": 4}},
        dataset_columns={"video_column": "video", "question_column": "question", "answer_column": "answer"},
    )
    processor = CHECKPOINTS["llava_onevision"].build()[1]
    source = MemorySource([*rows, short])
    make = Materialiser([source], processor, family_for("llava_onevision"), config, frozenset({"video"}), 0)
    batch = make(job(0, 2, 1))
    assert (batch.num_samples, batch.inputs["pixel_values_videos"].shape[:2]) == (2, (2, 4))
    (slot,) = batch.null_slots
    assert slot.origin.key == "2" and "2 frames, the others of its micro-batch 4" in slot.message
    assert make(job(2)).num_samples == 1
