"""The count of operations against what torch counts while a tiny model of each family is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.families.cells import _packed
from tests.unit.families.subjects import Subject, inputs_of, job, subject
from vlm_dist.config.peft import PeftConfig
from vlm_dist.data.types import MicroBatch
from vlm_dist.loss.labelled import LabelledHead
from vlm_dist.model import attach_adapter, enable_gradient_checkpointing, run_frozen_towers_without_graph
from vlm_dist.model.devices import find_gpu, peak_flops
from vlm_dist.model.flops import FlopModel

LANGUAGE = {"vision": "freeze", "projector": "freeze", "language": "lora"}
EVERYWHERE = {"vision": "lora", "projector": "lora", "language": "lora"}
PROJECTOR = {"vision": "freeze", "projector": "full", "language": "lora"}
FULL = {"vision": "full", "projector": "full", "language": "full"}

FAMILIES = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "llava", "llava_next", "llava_next_video", "llava_onevision",
    "internvl", "paligemma", "gemma3", "idefics2", "idefics3", "smolvlm", "pixtral", "mistral3",
)  # fmt: skip


def trained(
    one: Subject,
    policy: dict[str, str],
    *,
    recomputed: bool = False,
    language: Any = "all",
    targets: Any = "all-linear",
) -> Any:
    settings = PeftConfig(r=4, lora_alpha=4, lora_dropout=0.0, target_modules=targets)
    model = attach_adapter(one.load_model(), settings, policy)
    if recomputed:
        enable_gradient_checkpointing(model, language=language)
    run_frozen_towers_without_graph(model)
    return model


def measured(model: Any, batch: MicroBatch) -> int:
    """What torch counts of a forward and backward with the loss of this project."""
    head = LabelledHead(model)
    model.train()
    with FlopCounterMode(display=False) as flops, head.giving_loss(batch.labels, -100):
        model(**inputs_of(batch), use_cache=False)["loss"].backward()
    return int(flops.get_total_flops())


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


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next_video", "internvl", "smolvlm"])
def test_clips_too(name: str) -> None:
    one = subject(name)
    batch = one.materialiser(kinds=("video",))(job("clip", "clip"))
    compare(trained(one, EVERYWHERE), batch)


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


def test_gpus_are_known_by_their_names() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("H100") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe") == 756.5e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == peak_flops("NVIDIA A100-PCIE-40GB") == 312e12
    names = ("NVIDIA A10", "NVIDIA L4", "NVIDIA L40S", "NVIDIA GeForce RTX 4090", "NVIDIA RTX 6000 Ada Generation")
    found = [find_gpu(name) for name in (*names, "AMD Instinct MI300X", "NVIDIA B200")]
    assert [gpu.name for gpu in found if gpu] == ["A10", "L4", "L40S", "RTX 4090", "RTX 6000 Ada", "MI300X", "B200"]
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert peak_flops("Matrox G200") is None
