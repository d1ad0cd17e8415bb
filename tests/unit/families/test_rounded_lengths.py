"""Lengths that are rounded up: the same counts, losses and gradients as those that are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.unit.families.packs import assert_same, learn, load
from tests.unit.families.subjects import Subject, job, subject
from vlm_dist.data.types import MicroBatch, PackBudget
from vlm_dist.model.flops import FlopModel, SampleShare

MULTIPLE = 64
ROUNDED = {"pad_to_multiple_of": MULTIPLE}
ROWS = ("wide", "text", "tall")
#: Positions in three parts; a prefix, and pictures, that see all of themselves; pictures of one size.
PADDED = ("qwen2_vl", "paligemma", "gemma3", "llava")
PACKED = ("qwen2_vl", "qwen3_vl", "llava", "internvl")


def both(one: Subject, *, is_pack: bool) -> tuple[MicroBatch, MicroBatch]:
    """A micro-batch as it comes, and with its length rounded up."""
    asked = replace(job(*ROWS), pack=PackBudget(100_000)) if is_pack else job(*ROWS)
    plain = one.materialiser(packing=is_pack)(asked)
    rounded = one.materialiser(packing=is_pack, text_processing=ROUNDED)(asked)
    length, width = plain.labels.shape[1], rounded.labels.shape[1]
    assert length < width < length + MULTIPLE and width % MULTIPLE == 0
    assert torch.equal(rounded.labels[:, :length], plain.labels)
    assert (rounded.labels[:, length:] == -100).all()
    for name in ("num_samples", "num_tokens", "num_target_tokens", "sample_tokens", "sample_targets"):
        assert getattr(rounded, name) == getattr(plain, name), name
    assert rounded.num_computed_tokens == rounded.labels.numel()
    return plain, rounded


def lessons(model: Any, batch: MicroBatch, length: int) -> Any:
    """Logits of the first row up to a length, loss, and gradients."""
    logits, loss, gradients = learn(model, [(batch.inputs, batch.labels)])
    return logits[:length], loss, gradients


@pytest.mark.parametrize("name", PADDED)
def test_padded_rows_learn_the_same(name: str) -> None:
    one = subject(name)
    plain, rounded = both(one, is_pack=False)
    assert rounded.inputs["attention_mask"][:, plain.labels.shape[1] :].sum() == 0
    model, length = load(one, varlen=False).train(), plain.sample_tokens[0]
    assert_same(lessons(model, rounded, length), lessons(model, plain, length))


@pytest.mark.parametrize("varlen", [True, False], ids=["varlen", "mask"])
@pytest.mark.parametrize("name", PACKED)
def test_packs_learn_the_same(name: str, varlen: bool) -> None:
    one = subject(name)
    plain, rounded = both(one, is_pack=True)
    length = plain.labels.shape[1]
    assert rounded.inputs["cu_seq_lens"].tolist() == [*plain.inputs["cu_seq_lens"].tolist(), rounded.labels.shape[1]]
    assert (rounded.inputs["position_ids"][..., length] == 0).all()
    model = load(one, varlen=varlen).train()
    assert_same(lessons(model, rounded, length), lessons(model, plain, length))


def test_what_is_added_is_computed_but_is_no_work_of_the_samples() -> None:
    one = subject("qwen2_vl")
    counts = FlopModel.of(load(one, varlen=True).train())
    for is_pack in (False, True):
        plain, rounded = (
            counts.count(batch.inputs, batch.labels, SampleShare(tuple(batch.sample_tokens), batch.kinds))
            for batch in both(one, is_pack=is_pack)
        )
        assert rounded.model == pytest.approx(plain.model)
        assert rounded.hardware > plain.hardware


def test_a_length_that_fits_stays_and_prompts_are_left_alone() -> None:
    one = subject("llava")
    plain = one.materialiser()(job(*ROWS))
    same = one.materialiser(text_processing={"pad_to_multiple_of": plain.labels.shape[1]})(job(*ROWS))
    assert same.labels.shape == plain.labels.shape
    packed = one.materialiser(text_processing={"pad_to_multiple_of": 1})(replace(job(*ROWS), pack=PackBudget(10_000)))
    assert len(packed.inputs["cu_seq_lens"]) == len(ROWS) + 1
    prompts = [one.materialiser(for_generation=True, **more)(job(*ROWS)) for more in ({}, {"text_processing": ROUNDED})]
    assert prompts[0].labels.shape == prompts[1].labels.shape


def test_where_padding_is_learned_it_is_that_up_to_the_longest_sample() -> None:
    one = subject("llava")
    masking = {"mask_input_tokens": True, "mask_pad_token": False}
    plain, rounded = (
        one.materialiser(label_masking=masking, **more)(job(*ROWS)) for more in ({}, {"text_processing": ROUNDED})
    )
    assert rounded.num_target_tokens == plain.num_target_tokens > sum(plain.sample_targets) // 2
    length = plain.labels.shape[1]
    assert torch.equal(rounded.labels[:, :length], plain.labels) and (rounded.labels[:, length:] == -100).all()


def test_a_micro_batch_without_any_sample_is_rounded_too() -> None:
    one = subject("qwen2_vl")
    for asked in (job("damaged"), replace(job("damaged"), pack=PackBudget(10_000))):
        batch = one.materialiser(packing=True, text_processing=ROUNDED)(asked)
        assert batch.num_samples == 0 and batch.labels.shape[1] % MULTIPLE == 0
        assert (batch.labels == -100).all()
