"""The count of operations against what torch counts while a tiny model of each family is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.families.cells import _packed
from tests.unit.families.subjects import job, subject
from tests.unit.model.counted import (
    CLIPS,
    EVERYWHERE,
    FAMILIES,
    FULL,
    LANGUAGE,
    PROJECTOR,
    TOWER,
    TOWER_ALONE,
    measured,
    trained,
)
from vlm_dist.data.types import MicroBatch
from vlm_dist.model.devices import find_gpu, peak_flops
from vlm_dist.model.flops import FlopModel, Flops, SampleShare


def compare(model: Any, batch: MicroBatch) -> None:
    counted = FlopModel.of(model).count(batch.inputs, batch.labels)
    assert counted.hardware == pytest.approx(measured(model, batch), rel=0.02)
    assert 0 < counted.model < counted.hardware


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_costs_what_torch_counts(name: str, recomputed: bool) -> None:
    one = subject(name)
    batch = one.materialiser()(job("wide", "text", "three"))  # padded
    for policy in (LANGUAGE, EVERYWHERE, PROJECTOR, FULL):
        compare(trained(one, policy, recomputed=recomputed), batch)
    if one.family.packing is not None:
        packed = one.materialiser(packing=True)(_packed(job("wide", "text", "long")))
        compare(trained(one, LANGUAGE, recomputed=recomputed), packed)


@pytest.mark.parametrize("name", CLIPS)
def test_clips_too(name: str) -> None:
    one = subject(name)
    batch = one.materialiser(kinds=("video",))(job("clip", "clip"))
    compare(trained(one, EVERYWHERE), batch)
    compare(trained(one, LANGUAGE, recomputed=True), batch)


@pytest.mark.parametrize("policy", [TOWER, TOWER_ALONE], ids=["in full", "alone"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "pixtral"])
def test_trained_towers(name: str, policy: dict[str, str]) -> None:
    one = subject(name)
    compare(trained(one, policy, recomputed=True), one.materialiser()(job("wide", "text", "three")))


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dora_computes_its_norms_and_with_dropout_every_layer_twice(dropout: float, recomputed: bool) -> None:
    one = subject("qwen2_vl")
    batch = one.materialiser()(job("wide", "tall"))
    plain, dora = (
        trained(one, EVERYWHERE, recomputed=recomputed, use_dora=use_dora, lora_dropout=dropout)
        for use_dora in (False, True)
    )
    compare(dora, batch)
    without, with_dora = (FlopModel.of(model).count(batch.inputs, batch.labels) for model in (plain, dora))
    assert with_dora.model == without.model  # what LoRA is for, as the samples need it
    assert with_dora.hardware > without.hardware * (1.3 if dropout else 1.0)


@pytest.mark.parametrize("modules", [("lm_head",), ("embed_tokens",), ("lm_head", "embed_tokens")])
def test_modules_in_full_beside_lora(modules: tuple[str, ...]) -> None:
    one = subject("llava")
    batch = one.materialiser()(job("wide", "tall"))
    compare(trained(one, LANGUAGE, modules_to_save=modules), batch)


@pytest.mark.parametrize("policy", [LANGUAGE, EVERYWHERE, PROJECTOR, TOWER], ids=["language", "lora", "full", "tower"])
def test_what_a_sample_needs_is_all_that_is_computed_but_what_it_does_not_see(policy: dict[str, str]) -> None:
    """Attention that masks computes what is to come, too; nothing else is left out where nothing is computed again."""
    one = subject("qwen2_vl")
    batch = one.materialiser()(job("wide"))
    model = trained(one, policy, eager=True)
    counter = FlopModel.of(model)
    unseen = sum(3 * 4.0 * one.width for one in counter.attentions if one.kind == "causal") * batch.num_tokens**2 / 2
    needed = counter.count(batch.inputs, batch.labels).model
    assert needed + unseen == pytest.approx(measured(model, batch), rel=1e-3)
    again = FlopModel.of(trained(one, policy, eager=True, recomputed=True)).count(batch.inputs, batch.labels)
    assert again.model == needed < again.hardware


def test_a_frozen_head_costs_two_products_and_a_trained_one_four() -> None:
    one = subject("llava")
    heads = {}
    for name, modules in (("frozen", ()), ("trained", ("lm_head",))):
        products = FlopModel.of(trained(one, LANGUAGE, modules_to_save=modules)).products
        (heads[name],) = (product for product in products if product.tower == "head")
    assert heads["frozen"].model_flops == heads["frozen"].hardware_flops == 4 * heads["frozen"].weights
    assert heads["trained"].model_flops == 6 * heads["trained"].weights
    assert heads["trained"].hardware_flops == 8 * heads["trained"].weights  # its logits are computed again


def test_some_blocks_again_and_some_layers_with_lora() -> None:
    one = subject("qwen2_5_vl")
    batch = one.materialiser()(job("wide", "tall"))
    compare(trained(one, LANGUAGE, recomputed=True, language=1), batch)
    compare(trained(one, LANGUAGE, recomputed=True, targets=["q_proj", "v_proj"]), batch)
    compare(trained(one, EVERYWHERE, recomputed=True, targets=["o_proj", "proj", "down_proj"]), batch)


def test_no_weight_and_no_pixel_is_needed() -> None:
    one = subject("qwen2_vl")
    batch = one.materialiser()(job("wide", "tall"))
    model = trained(one, LANGUAGE, recomputed=True)
    expected = FlopModel.of(model).count(batch.inputs, batch.labels)
    pixels = torch.empty_like(batch.inputs["pixel_values"], device="meta")
    counted = FlopModel.of(model.to("meta")).count(batch.inputs | {"pixel_values": pixels}, batch.labels)
    assert counted == expected


def test_padding_is_no_work_for_the_samples() -> None:
    """A batch's operations are those of its samples; what is padded is computed, and counted apart."""
    one = subject("qwen2_vl")
    make = one.materialiser()
    counter = FlopModel.of(trained(one, LANGUAGE))
    together, *alone = (make(job(*names)) for names in (("wide", "long"), ("wide",), ("long",)))
    padded, *each = (counter.count(batch.inputs, batch.labels) for batch in (together, *alone))
    assert padded.model == pytest.approx(sum(flops.model for flops in each))
    assert padded.hardware > 1.2 * sum(flops.hardware for flops in each)
    packed_batch = one.materialiser(packing=True)(_packed(job("wide", "long")))
    packed = counter.count(packed_batch.inputs, packed_batch.labels)
    assert packed.model == pytest.approx(padded.model, rel=0.01)  # the first label of a packed sample is none


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["qwen2_vl", "llava", "internvl"])
def test_dummies_are_no_work_for_the_samples(name: str, packing: bool) -> None:
    """What a micro-batch without a picture shows the tower is computed, but no sample needs it."""
    one = subject(name)
    counter = FlopModel.of(trained(one, EVERYWHERE))
    rows = job("text", "text2", "damaged")
    with_dummy, alone = (
        one.materialiser(towers=towers, packing=packing)(_packed(rows) if packing else rows)
        for towers in (("image",), ())
    )
    assert "pixel_values" in with_dummy.inputs and "pixel_values" not in alone.inputs
    found, expected = (of_samples(counter, batch) for batch in (with_dummy, alone))
    assert found.model == pytest.approx(expected.model)
    assert found.hardware > expected.hardware
    empty = of_samples(counter, one.materialiser()(job("damaged")))
    assert empty.model == 0 < empty.hardware


@pytest.mark.parametrize(("kind", "names"), [("video", ("clip", "text2")), ("image", ("wide", "text2"))])
def test_a_dummy_of_one_kind_beside_samples_of_the_other(kind: str, names: tuple[str, ...]) -> None:
    one = subject("qwen2_vl")
    counter = FlopModel.of(trained(one, EVERYWHERE))
    both = of_samples(counter, one.materialiser(kinds=("image", "video"))(job(*names)))
    alone = of_samples(counter, one.materialiser(kinds=(kind,))(job(*names)))
    assert both.model == pytest.approx(alone.model)
    assert both.hardware > alone.hardware


def test_pictures_and_clips_are_all_of_the_samples() -> None:
    one = subject("qwen2_vl")
    counter = FlopModel.of(trained(one, EVERYWHERE))
    batch = one.materialiser(kinds=("image", "video"))(job("clip", "wide", "text"))
    assert of_samples(counter, batch) == counter.count(batch.inputs, batch.labels)


def of_samples(counter: FlopModel, batch: MicroBatch) -> Flops:
    return counter.count(batch.inputs, batch.labels, SampleShare(tuple(batch.sample_tokens), batch.kinds))


def test_gpus_are_known_by_their_names() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("H100") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe") == 756.5e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == peak_flops("NVIDIA A100-PCIE-40GB") == 312e12
    names = ("NVIDIA A10", "NVIDIA L4", "NVIDIA L40S", "NVIDIA GeForce RTX 4090", "NVIDIA RTX 6000 Ada Generation")
    found = [find_gpu(name) for name in (*names, "AMD Instinct MI300X", "NVIDIA B200")]
    assert [gpu.name for gpu in found if gpu] == ["A10", "L4", "L40S", "RTX 4090", "RTX 6000 Ada", "MI300X", "B200"]
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert peak_flops("Matrox G200") is None
