"""What is asked of every family: one function per column of the table in docs/models.md.

A function raises where the family fails, and returns what the table says: "yes", or something shorter than a sentence
where there is more to say. Where the product itself refuses what is asked, its message is the reason in the table.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, takewhile

import torch
from peft import PeftModel
from torch import Tensor

from tests.unit.data.samples import collator
from tests.unit.families.subjects import ROWS, TALKS, Subject, inputs_of, job
from vlm_dist.config.peft import PeftConfig
from vlm_dist.data.encoding.fit import MediaSizes
from vlm_dist.data.encoding.packing import check_packing
from vlm_dist.data.encoding.preconditions import choose_kinds
from vlm_dist.data.materialise import Materialiser
from vlm_dist.data.types import IGNORE_INDEX, MicroBatch, MicroBatchJob, PackBudget
from vlm_dist.errors import ConfigError
from vlm_dist.families.attention import check_attention
from vlm_dist.loss import token_loss_sum
from vlm_dist.model import attach_adapter, tower_table
from vlm_dist.model.towers import TOWERS, find_towers, tower_of

#: Largest difference of a logit that is rounding, as a share of the largest logit.
ROUNDING = 5e-6
#: A budget that no micro-batch here exceeds.
_ROOM = PackBudget(max_tokens=4096)

#: In the words of the guide.
_OWN_FORMAT = {
    "system_prompt": "Be brief.",
    "training_messages": [
        {"role": "system", "content": [{"type": "text", "text": "{system_prompt}"}]},
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "Context: {context_column}\nQuestion: {question_column}"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "{answer_column}"}]},
    ],
}

Cell = Callable[[Subject], str]


def image(subject: Subject) -> str:
    """Pictures of different sizes in one micro-batch are what they are alone; every tower learns from them."""
    _same_as_alone(subject, subject.materialiser(), "wide", "tall")
    _every_tower_gets_gradients(subject, subject.materialiser()(job("wide", "tall")))
    return "yes"


def text_only(subject: Subject) -> str:
    """A micro-batch without a picture gives the loss of its text alone, and calls the vision tower all the same."""
    rows = ("text", "text2")
    with_dummy = subject.materialiser()(job(*rows))
    alone = subject.materialiser(towers=())(job(*rows))
    with torch.no_grad():
        ours, texts = (token_loss_sum(subject.forward(batch), batch.labels) for batch in (with_dummy, alone))
    assert torch.allclose(ours, texts, rtol=1e-5), (ours, texts)
    _every_tower_gets_gradients(subject, with_dummy, vision_may_be_zero=True)
    return "yes"


def mixed(subject: Subject) -> str:
    """Pictures and text, and damaged samples, in one micro-batch; one in which nothing is left still runs."""
    make = subject.materialiser()
    _same_as_alone(subject, make, "wide", "text", "tall")
    empty = make(job("damaged", "damaged"))
    assert empty.num_samples == empty.num_target_tokens == 0
    assert (empty.labels == IGNORE_INDEX).all()
    assert [slot.null_class for slot in empty.null_slots] == ["bad_sample"] * 2
    _every_tower_gets_gradients(subject, empty, all_may_be_zero=True)
    return "yes"


def multi_image(subject: Subject) -> str:
    """Several pictures of different sizes in one sample."""
    _same_as_alone(subject, subject.materialiser(), "three", "wide", "text2")
    return "yes"


def multi_turn(subject: Subject) -> str:
    """Conversations with a picture in each turn: what carries loss is what the assistant says, no more and no less."""
    make = subject.materialiser(talks=True)
    names = list(TALKS)
    batch = _same_as_alone(subject, make, *names)
    said = [[turn["content"] for turn in talk["messages"] if turn["role"] == "assistant"] for talk in TALKS.values()]
    if subject.family.answer_argument is not None:
        said = [turns[-1:] for turns in said]
    for learned, turns in zip(subject.answers(batch), said, strict=True):
        _is_said(learned, turns)
    return "yes" if subject.family.answer_argument is None else "last answer"


def video(subject: Subject) -> str:
    """Clips of different sizes, and clips beside text."""
    choose_kinds(collator(data_processing={"image_data": False, "video_data": True}), subject.family)
    make = subject.materialiser(kinds=("video",))
    _same_as_alone(subject, make, "clip", "clip2")
    _same_as_alone(subject, make, "clip", "text2")
    _every_tower_gets_gradients(subject, make(job("clip")))
    _every_tower_gets_gradients(subject, make(job("text")), vision_may_be_zero=True)
    return "yes"


def image_and_video(subject: Subject) -> str:
    """Both in one sample, and samples with either in one micro-batch."""
    video(subject)
    if not subject.family.takes_image_and_video:
        raise ConfigError(f"models of the family {subject.family.name} are given one kind: videos have priority")
    make = subject.materialiser(kinds=("image", "video"))
    _same_as_alone(subject, make, "clip and picture", "wide", "clip", "text2")
    return "yes"


def labels(subject: Subject) -> str:
    """The answers with their terminators and nothing else; or all but padding and what stands for media."""
    make = subject.materialiser()
    rows = ("wide", "text", "three")
    learned = subject.answers(make(job(*rows)))
    for text, name in zip(learned, rows, strict=True):
        _is_said(text, [ROWS[name]["answer"]])
    everything = subject.materialiser(label_masking={"mask_input_tokens": False})
    for name in rows:
        batch = everything(job(name))
        ids, carries_loss = batch.inputs["input_ids"][0], batch.labels[0] != IGNORE_INDEX
        text = subject.decode(ids[carries_loss])
        assert ROWS[name]["question"] in text and ROWS[name]["answer"] in text, text
        visual = {"<image>", *subject.family.image_tokens, *subject.family.video_tokens}
        assert not [token for token in visual if token in text], text
        if not ROWS[name]["image"]:
            assert bool(carries_loss[1 : batch.num_tokens].all())  # nothing comes before the first to tell it from
        assert not carries_loss[batch.num_tokens :].any()
    return "yes"


def message_format(subject: Subject) -> str:
    """A format of the user's own, through the template: a system prompt in its own turn, a context."""
    make = subject.materialiser(message_format=_OWN_FORMAT, label_masking={"mask_input_tokens": True})
    batch = _same_as_alone(subject, make, "told", "told more")
    for row, name in enumerate(("told", "told more")):
        columns = ROWS[name]
        text = subject.decode(batch.inputs["input_ids"][row])
        order = ["Be brief.", "Context:", columns["context"], columns["question"], columns["answer"]]
        places = [text.find(part) for part in order]
        assert -1 not in places and places == sorted(places), (text, places)
        _is_said(subject.answers(batch)[row], [columns["answer"]])
    return "yes"


def truncation(subject: Subject) -> str:
    """A text that is too long is cut behind the last token that stands for media."""
    whole = subject.materialiser()(job("long"))
    visual = torch.tensor(sorted(_visual_ids(subject)))
    num_visual = int(_is_visual(whole, visual).sum())
    limit = whole.num_tokens - 30 - (num_visual if subject.family.follows_resolution else 0)
    tight = subject.materialiser(text_processing={"max_length": limit})
    batch = tight(job("long", "wide"))
    assert not batch.null_slots, batch.null_slots
    assert batch.num_cut == 1 and batch.labels.shape[1] <= limit
    kept = [int(_is_visual(one, visual).sum()) for one in (whole, batch)]
    assert kept[0] == kept[1] or batch.num_reduced, kept
    _same_as_alone(subject, tight, "long", "wide")
    return "yes"


def lengths(subject: Subject) -> str:
    """The planner's count of a sample is what the sample comes to, at sizes that were not tried at the start."""
    kinds = ("image", "video") if subject.family.takes_image_and_video else ("image",)
    make = subject.materialiser(kinds=kinds)
    names = ["wide", "tall", "text", "three", *(["clip and picture"] if "video" in kinds else [])]
    predicted = make.measure(job(*names))
    for name, length in zip(names, predicted, strict=True):
        assert make(job(name)).num_tokens == length.num_tokens, name
    counter = make.visual_counter
    for width, height in ((33, 71), (150, 40), (512, 384), (57, 57)):
        blank = MediaSizes(((width, height),)).images[0]
        told = counter.count("image", 1, blank)
        assert told == counter._measure("image", 1, width, height), (width, height)  # what the processor really does
    return "by rule" if "image" in counter.estimated else "measured"


def packing(subject: Subject) -> str:
    """Samples in one row see nothing of each other."""
    check_packing(subject.family)
    kinds = ("image", "video") if subject.family.takes_image_and_video else ("image",)
    make = subject.materialiser(kinds=kinds, packing=True)
    names = ["wide", "text", "three", *(["clip", "clip and picture"] if "video" in kinds else ["tall"])]
    packed = make(_packed(job(*names)))
    assert packed.inputs["input_ids"].shape[0] == 1 and not packed.null_slots
    with torch.no_grad():
        row = subject.model(**inputs_of(packed)).logits[0]  # the cache is off because the model was loaded so
        start = 0
        for name in names:
            alone = subject.forward(subject.materialiser(kinds=kinds, towers=())(job(name)))[0]
            _assert_close(row[start : start + alone.shape[0]], alone, name)
            start += alone.shape[0]
    return "yes"


def flash(subject: Subject) -> str:
    """Whether flash attention computes the same; only said here, as it needs a GPU."""
    check_attention(subject.family, "flash_attention_2")
    assert subject.model._supports_flash_attn
    return "yes"


def lora_towers(subject: Subject) -> str:
    """Towers that LoRA trains: each B gets a gradient, and PEFT alone loads what was trained."""
    batch = subject.materialiser()(job("wide", "text", "three"))
    settings = PeftConfig(r=2, lora_alpha=4, lora_dropout=0.0)
    model = attach_adapter(subject.load_model(), settings, dict.fromkeys(TOWERS, "lora"))
    token_loss_sum(model(**inputs_of(batch), use_cache=False).logits, batch.labels).backward()
    unmoved = [name for name, weight in model.named_parameters() if "lora_B" in name and not _moves(weight)]
    assert not unmoved, unmoved
    with torch.no_grad(), tempfile.TemporaryDirectory() as directory:
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
        trained = model.eval()(**inputs_of(batch), use_cache=False).logits
        model.save_pretrained(directory, save_embedding_layers=False)
        loaded = PeftModel.from_pretrained(subject.load_model(), directory).eval()
        _assert_close(loaded(**inputs_of(batch), use_cache=False).logits, trained, "loaded by PEFT")
        assert not torch.allclose(subject.forward(batch), trained, atol=1e-3)
    table = tower_table(model, dict.fromkeys(TOWERS, "lora"))
    return ", ".join(row.tower for row in table if row.num_lora_modules and row.tower in TOWERS)


def _moves(weight: Tensor) -> bool:
    return weight.grad is not None and bool(weight.grad.abs().max() > 0)


def generation(subject: Subject) -> str:
    """Prompts of different lengths are continued; each as if it were alone."""
    make = subject.materialiser(for_generation=True)
    together = make(job("wide", "text"))
    assert together.references == [ROWS["wide"]["answer"], ROWS["text"]["answer"]]
    for number, name in enumerate(("wide", "text")):
        alone = make(job(name))
        texts = [_continued(subject, batch)[row] for batch, row in ((together, number), (alone, 0))]
        assert texts[0] == texts[1], name
    return "yes"


def _continued(subject: Subject, batch: MicroBatch) -> list[list[int]]:
    """What each row goes on with, up to its end: a batch goes on until the last of its rows ends."""
    tokenizer = subject.processor.tokenizer
    with torch.no_grad():
        ids = subject.model.generate(**inputs_of(batch), max_new_tokens=4, do_sample=False)
    rows = ids[:, batch.inputs["input_ids"].shape[1] :].tolist()
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    return [list(takewhile(lambda token: token not in ends, row)) for row in rows]


def _same_as_alone(subject: Subject, make: Materialiser, *names: str) -> MicroBatch:
    """Materialise samples together and one by one, and compare their tokens and logits."""
    batch = make(job(*names))
    assert not batch.null_slots, batch.null_slots
    with torch.no_grad():
        together = subject.forward(batch)
        for row, name in enumerate(names):
            one = make(job(name))
            length = one.num_tokens
            for key in ("input_ids", "labels"):
                mine, alone = (x.labels if key == "labels" else x.inputs[key] for x in (batch, one))
                assert torch.equal(mine[row, :length], alone[0, :length]), (name, key)
            _assert_close(together[row, :length], subject.forward(one)[0, :length], name)
    return batch


def _assert_close(ours: Tensor, theirs: Tensor, name: str) -> None:
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    assert difference < ROUNDING, (name, difference)


def _every_tower_gets_gradients(
    subject: Subject, batch: MicroBatch, *, vision_may_be_zero: bool = False, all_may_be_zero: bool = False
) -> None:
    model = subject.model
    model.zero_grad(set_to_none=True)
    loss = token_loss_sum(subject.forward(batch), batch.labels)
    assert bool(torch.isfinite(loss))
    loss.backward()
    towers = find_towers(model)
    largest: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            tower = tower_of(name, towers)
            largest[tower] = max(largest.get(tower, 0.0), float(parameter.grad.abs().max()))
    for tower in TOWERS:
        assert tower in largest, f"nothing of the {tower} tower is in the graph"
        may_be_zero = all_may_be_zero or (vision_may_be_zero and tower != "language")
        assert largest[tower] > 0 or may_be_zero, f"the {tower} tower learns nothing"
    model.zero_grad(set_to_none=True)


def _is_said(learned: str, turns: list[str]) -> None:
    """Whether exactly these turns are learned, each with one terminator behind it, which is a special token.

    Some templates have a space between the generation prompt and an answer, which the model has to say itself.
    """
    learned = learned.removeprefix(" ")
    places = [learned.find(turn) for turn in turns]
    assert places[0] == 0 and -1 not in places, (learned, turns)
    ends = [place + len(turn) for place, turn in zip(places, turns, strict=True)]
    terminators = [learned[end:start] for end, start in zip(ends, [*places[1:], len(learned)], strict=True)]
    for terminator in terminators:
        assert terminator.strip() and " " not in terminator.strip() and len(terminator) < 25, (learned, turns)
    assert all(a < b for a, b in pairwise(places))


def _visual_ids(subject: Subject) -> set[int]:
    tokenizer = subject.processor.tokenizer
    return {tokenizer.convert_tokens_to_ids(token) for token in subject.family.image_tokens}


def _is_visual(batch: MicroBatch, visual: Tensor) -> Tensor:
    ids = batch.inputs["input_ids"][0]
    return torch.isin(ids, visual) | (ids < 0)


def _packed(padded: MicroBatchJob) -> MicroBatchJob:
    return replace(padded, pack=_ROOM)


#: Column of the table -> what fills it.
CELLS: dict[str, Cell] = {
    "image": image,
    "text only": text_only,
    "mixed": mixed,
    "multi-image": multi_image,
    "multi-turn": multi_turn,
    "video": video,
    "image + video": image_and_video,
    "message format": message_format,
    "assistant masks": labels,
    "truncation": truncation,
    "exact lengths": lengths,
    "packing": packing,
    "flash": flash,
    "generation": generation,
    "LoRA towers": lora_towers,
}
