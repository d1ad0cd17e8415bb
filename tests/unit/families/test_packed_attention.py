"""A pack is its samples, to rounding and without a mask, for every family that packs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.unit.families.packs import NAMES, Pack, assert_same, learn, load, logits, make_pack, squares_of
from tests.unit.families.subjects import job, subject
from vlm_dist.errors import ConfigError, ModelError
from vlm_dist.families import FAMILIES, family_for
from vlm_dist.families.attention import check_attention
from vlm_dist.model import enable_gradient_checkpointing
from vlm_dist.model.attention.choice import attention_of, use_varlen, varlen_refusal
from vlm_dist.model.attention.interface import leave_rows_unsearched, varlen_attention
from vlm_dist.model.flops import FlopModel


@functools.cache
def packed(name: str) -> Pack:
    return make_pack(subject(name))


@functools.cache
def alone(name: str) -> Any:
    """What the samples of the pack learn one by one, by the model's own attention."""
    return learn(load(subject(name), varlen=False).train(), packed(name).alone)


def test_every_family_that_packs_is_tried() -> None:
    tried = {subject(name).family.name for name in NAMES}
    assert tried == {family.name for family in FAMILIES if family.packing is not None}


@pytest.mark.parametrize("how", ["mask", "varlen", "varlen, recomputed"])
@pytest.mark.parametrize("name", NAMES)
def test_a_pack_learns_what_its_samples_do(name: str, how: str) -> None:
    row = packed(name)
    assert 1 in row.lengths and len(set(row.lengths)) > 3
    model = load(subject(name), varlen=how != "mask").train()
    if "recomputed" in how:
        enable_gradient_checkpointing(model)
    assert_same(learn(model, [(row.inputs, row.labels)]), alone(name))


@pytest.mark.parametrize("name", NAMES)
def test_no_sample_moves_another_by_one_bit(name: str) -> None:
    row = packed(name)
    model = load(subject(name), varlen=True).eval()
    ends = row.inputs["cu_seq_lens"].tolist()
    changed = 1  # the text: another word behind its first
    start, end = ends[changed], ends[changed + 1]
    inputs = row.inputs | {"input_ids": row.inputs["input_ids"].clone()}
    inputs["input_ids"][0, start + 1] = inputs["input_ids"][0, end - 1]
    with torch.no_grad():
        before, after = logits(model, row.inputs)[0], logits(model, inputs)[0]
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end:], after[end:])
    assert not torch.allclose(before[start + 1 : end], after[start + 1 : end])


@pytest.mark.parametrize("name", NAMES)
def test_no_mask_is_ever_made(name: str) -> None:
    row = packed(name)
    length = row.labels.shape[1]
    found = {}
    for varlen in (False, True):
        model = load(subject(name), varlen=varlen).train()
        with squares_of(length) as shapes:
            logits(model, row.inputs)
        found[varlen] = shapes.squares
    assert found[True] == []
    assert found[False]  # the mask of the other way is seen


def test_attention_is_the_sum_of_the_squares() -> None:
    one = subject("qwen2_vl")
    row = make_pack(one, "text", "wide", "tall", "text2")
    config = one.model.config.get_text_config()
    counted = {}
    for varlen in (False, True):
        model = load(one, varlen=varlen).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            logits(model, row.inputs)
        layers = [name for name in counter.get_flop_counts() if name.endswith("language_model.layers.0.self_attn")]
        of_layer = counter.get_flop_counts()[layers[0]]
        counted[varlen] = sum(flops for op, flops in of_layer.items() if "attention" in str(op) or "bmm" in str(op))
    per_pair = 4 * config.hidden_size
    assert counted[False] == per_pair * sum(row.lengths) ** 2
    assert counted[True] == per_pair * sum(length**2 for length in row.lengths)
    assert counted[True] < 0.4 * counted[False]


def test_the_count_of_operations_knows_what_is_left_out() -> None:
    row = packed("qwen2_vl")
    models = [load(subject("qwen2_vl"), varlen=varlen) for varlen in (False, True)]
    masked, ours = (FlopModel.of(model).count(row.inputs, row.labels) for model in models)
    assert ours.model == masked.model
    causal = [one for one in FlopModel.of(models[1]).attentions if one.kind == "causal"]
    assert all(one.has_backward for one in causal)
    per_pair = sum(4.0 * one.width * (1 + 2.5) for one in causal)  # forward, and the backward of a fused kernel
    left_out = sum(row.lengths) ** 2 - sum(length**2 for length in row.lengths) / 2
    assert masked.hardware - ours.hardware == pytest.approx(per_pair * left_out)
    padded = subject("qwen2_vl").materialiser()(job("wide", "text"))
    both = [FlopModel.of(model).count(padded.inputs, padded.labels).hardware for model in models]
    assert both[0] == both[1]  # rows are masked either way


@pytest.mark.parametrize("window", [4, 1000])
def test_a_sliding_window_is_of_the_sample(window: int) -> None:
    row, found = packed("pixtral"), []
    for varlen in (False, True):
        model = subject("pixtral").load_model().eval()
        if varlen:
            use_varlen(model)
        model.config.get_text_config().sliding_window = window
        with torch.no_grad():
            found.append(logits(model, row.inputs))
    assert (found[0] - found[1]).abs().max() <= 1e-5
    with torch.no_grad():
        whole = logits(subject("pixtral").model, row.inputs)
    assert torch.allclose(found[0], whole, atol=1e-5) == (window == 1000)


def test_flash_attention_is_told_the_borders_and_nobody_looks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    row, told = packed("llava"), []

    def kernel(*args: Any, **kwargs: Any) -> Any:
        told.append({name: kwargs.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q")})
        assert args[4] is None  # no mask
        return varlen_attention(*args, **kwargs)

    def search(position_ids: torch.Tensor) -> None:
        raise AssertionError("asked for the borders")

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", kernel)
    leave_rows_unsearched.cache_clear()
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", search)
    leave_rows_unsearched()
    model = subject("llava").load_model().eval()
    model.config.get_text_config()._attn_implementation_internal = "flash_attention_2"
    with torch.no_grad():
        found = logits(model, row.inputs)
    monkeypatch.undo()
    with torch.no_grad():
        wanted = [logits(subject("llava").model, inputs) for inputs, _ in row.alone]
    assert (found - torch.cat(wanted, dim=1)).abs().max() <= 1e-5
    assert len(told) == model.config.get_text_config().num_hidden_layers
    for one in told:
        assert one["cu_seq_lens_q"] is one["cu_seq_lens_k"]
        assert torch.equal(one["cu_seq_lens_q"], row.inputs["cu_seq_lens"])
        assert one["max_length_q"] == max(row.lengths)


def test_padded_rows_and_a_cache_are_those_of_sdpa() -> None:
    one = subject("qwen2_vl")
    batch = one.materialiser()(job("wide", "text"))
    plain, ours = one.load_model().eval(), one.load_model().eval()
    use_varlen(ours)
    with torch.no_grad():
        wanted, found = (model(**batch.inputs, use_cache=False).logits for model in (plain, ours))
        kept = batch.inputs["attention_mask"].bool()
        assert (found - wanted)[kept].abs().max() <= 1e-5
        arguments = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(ours.generate(**batch.inputs, **arguments), plain.generate(**batch.inputs, **arguments))


def test_pictures_of_a_tower_that_is_told_their_borders_are_not_cut() -> None:
    for name in NAMES:
        model = subject(name).load_model()
        use_varlen(model)
        told = name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")
        assert attention_of(model) == ("varlen", "varlen_flash" if told else "sdpa"), name


def test_a_model_that_keeps_the_borders_to_itself_is_no_silent_leak() -> None:
    one = subject("llava")
    model = one.load_model().eval()
    use_varlen(model)
    layer = model.model.language_model.layers[1].self_attn
    own = layer.forward

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **{key: value for key, value in kwargs.items() if not key.startswith("cu_seq_lens")})

    layer.forward = forgetful
    with pytest.raises(ModelError, match="does not hand the borders of samples on"):
        logits(model, packed("llava").inputs)
    layer.forward = own
    with torch.no_grad():  # the failure leaves nothing behind
        padded = one.forward(one.materialiser()(job("text")))
        assert torch.isfinite(padded).all()


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "phi3_v"])
def test_a_family_that_needs_more_than_borders_is_refused(name: str) -> None:
    family = family_for(name)
    with pytest.raises(ConfigError) as caught:
        check_attention(family, "varlen")
    assert str(caught.value).startswith("loading_params.attn_implementation: varlen is wrong for models of the family")
    assert family.packing_refusal in str(caught.value)
    check_attention(family, None)


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("attn_logit_softcapping", 30.0, "caps its scores"),
        ("attention_chunk_size", 64, "cuts samples into chunks"),
        ("_attn_implementation_internal", "eager", "has no SDPA"),
    ],
)
def test_what_cannot_go_without_a_mask_is_refused(setting: str, value: Any, reason: str) -> None:
    model = subject("llava").load_model()
    setattr(model.config.get_text_config(), setting, value)
    assert reason in str(varlen_refusal(model))
    with pytest.raises(ModelError, match=f"varlen is not possible for .*{reason}; set it to null"):
        use_varlen(model)
