"""Weights of models of true size, parts by stage, time and advice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pytest

from tests.unit.estimate.runs import write_run
from tests.unit.estimate.true_sizes import MODELS
from vlm_dist.config import load_run
from vlm_dist.errors import ConfigError
from vlm_dist.estimate.advice import advise
from vlm_dist.estimate.estimate import Estimate, estimate, machine_of
from vlm_dist.estimate.memory import GIB, Ranks, Variant, held
from vlm_dist.estimate.model import Weights
from vlm_dist.estimate.time import StepTime, link_rate, step_time
from vlm_dist.model.flops import Flops

WEIGHTS = Weights(1_000_000_000, 10_000_000, 2e9, 2, 1_000_000, 2_000_000, {})


def made(
    run: Path, *overrides: str, gpus: int = 8, memory: float = 80, nodes: int = 1, link: str | None = None
) -> Estimate:
    return estimate(load_run(run, list(overrides)), machine_of(gpus, nodes, memory, "H100", link, 0.4))


@pytest.mark.parametrize("name", MODELS)
def test_models_of_true_size_have_their_weights_in_seconds(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path, name)
    start = perf_counter()
    found = made(run)
    assert perf_counter() - start < 20
    assert found.weights.num_frozen == MODELS[name][3]
    assert found.weights.frozen_bytes == 2 * MODELS[name][3]
    assert all(row.largest.parts["adapter"] > 0 for row in found.rows)
    by_variant = {row.variant: row for row in found.rows}
    two, three = (by_variant[Variant(stage)] for stage in (2, 3))
    assert two.largest.parts["base"] == found.weights.frozen_bytes
    assert three.largest.parts["base"] < two.largest.parts["base"] / 7
    kept = by_variant[Variant(2, recomputes=False)]
    assert kept.largest.total > 2 * two.largest.total
    assert kept.flops.model == two.flops.model and kept.flops.hardware < two.flops.hardware
    assert two.largest_units > kept.largest_units >= 1
    text = advise(found).text
    assert text.startswith("The run fits as it is") and "ZeRO-2 is enough" in text


def test_parts_of_every_stage() -> None:
    ranks = Ranks(8)
    parts = {stage: held(WEIGHTS, Variant(stage), ranks, {}).parts for stage in (0, 1, 2, 3)}
    assert parts[0]["base"] == parts[2]["base"] == 2e9
    assert parts[0]["optimizer"] == 12e7 and parts[1]["optimizer"] == parts[2]["optimizer"] == 12e7 / 8
    assert parts[1]["gradients"] == 4e7 and parts[2]["gradients"] == 4e7 / 8
    assert parts[2]["gathered and buckets"] == 4e7 and parts[0]["gathered and buckets"] == 0
    assert parts[3]["base"] == 2 * (1e6 + 999e6 / 8)
    moved = held(WEIGHTS, Variant(3, True, True), ranks, {})
    assert moved.parts["optimizer"] == 0 and moved.parts["base"] == 2e6
    assert moved.host == 12e7 / 8 + 2 * 999e6 / 8
    on_nodes = held(WEIGHTS, Variant(3), Ranks(8, 4), {})  # each node keeps the base once more
    assert on_nodes.parts["base"] == pytest.approx(2 * (1e6 + 999e6 / 32 + 999e6 / 8))


def test_slow_links_speak_for_zero_2() -> None:
    def seconds(stage: int, link: str, nodes: int = 1) -> float:
        ranks = Ranks(8 // nodes, nodes)
        rate = link_rate(link, ranks)[1]
        return step_time(Flops(1e14, 1e14), 2, WEIGHTS, Variant(stage), ranks, rate, 1e15, 0.4).total

    assert seconds(2, "nvlink") == seconds(3, "nvlink") == 0.5  # hidden behind the computation
    assert seconds(3, "2") > 4 * seconds(2, "2") == 2.0
    assert seconds(3, "infiniband", nodes=2) < seconds(3, "2")
    assert link_rate(None, Ranks(8, 2))[0].startswith("infiniband")
    alone = step_time(Flops(1e14, 1e14), 2, WEIGHTS, Variant(3), Ranks(1), 1e9, 1e15, 0.4)
    assert alone.sending == 0
    moved = step_time(Flops(1e14, 1e14), 2, WEIGHTS, Variant(2, True), Ranks(8), 3e11, 1e15, 0.4)
    assert moved.total > 0.5


def test_advice_makes_it_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recommended is carried out by the settings that it names."""
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path, "Qwen2.5-VL-7B")
    for memory, has in ((48, "train.gradient_checkpointing=true"), (24, "deepspeed="), (16, "per_device")):
        first = made(run, "train.gradient_checkpointing=false", memory=memory)
        assert not first.run.fits
        advice = advise(first)
        assert any(has in setting for setting in advice.settings), advice
        again = made(run, "train.gradient_checkpointing=false", *advice.settings, memory=memory)
        assert again.run.fits and again.batch.global_batch_size == first.batch.global_batch_size
        assert "fits as it is" in advise(again).text
    hopeless = advise(made(run, memory=4))
    assert hopeless.text.startswith("Nothing fits") and hopeless.settings


def test_more_memory_is_used_for_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path, "Qwen2-VL-2B")
    advice = advise(made(run, "train.per_device_train_batch_size=1", memory=141))
    assert "without gradient checkpointing fits too" in advice.text
    assert advice.settings == ("train.gradient_checkpointing=false",)


def timed(found: Estimate, seconds: dict[Variant, float], fitting: set[Variant]) -> Estimate:
    """The same estimate with other times; what is not named takes ten times as long as anything that is."""
    longest = 10 * max(seconds.values())
    rows = [
        replace(row, fits=row.variant in fitting, time=StepTime(seconds.get(row.variant, longest), 0.0))
        for row in found.rows
    ]
    return replace(found, rows=tuple(rows))


def test_what_is_said_of_faster_ways_is_what_the_table_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = made(write_run(tmp_path, "Qwen2-VL-2B"), "deepspeed=ds_configs/zero3.json")
    mine, simpler, kept = Variant(3), Variant(2), Variant(2, recomputes=False)
    assert found.run.variant == mine
    cases = [
        (0.500, 0.490, True, "nothing else is faster by 3%"),
        (0.500, 0.490, False, "nothing else is faster by 3%"),
        (0.500, 0.450, False, "nothing else that fits is faster by 3%"),
        (0.500, 0.450, True, "takes 10% less time"),
        (0.0005, 0.00045, True, "what is faster gains nothing: a step computes for about a millisecond"),
        (0.0005, 0.00045, False, "nothing else that fits is faster by 3%"),
        (0.00102, 0.0006, True, "what is faster gains nothing"),
        (0.0012, 0.0006, True, "takes 17% less time"),  # down to a millisecond, below which nothing is gained
    ]
    for own, other, other_fits, says in cases:
        fitting = {mine, simpler, kept} if other_fits else {mine, simpler}
        advice = advise(timed(found, {mine: own, simpler: own, kept: other}, fitting))
        assert advice.text.startswith("The run fits as it is") and says in advice.text, (own, other, advice.text)
        assert bool(advice.settings) == ("less time" in says)


def test_the_offloading_of_a_file_of_ones_own_is_no_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It offloads the base alone: the preset that offloads the optimizer, too, is another way, though named alike."""
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path, "Qwen2-VL-2B")
    own = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    (tmp_path / "ds_configs" / "own.json").write_text(json.dumps(own))
    found = made(run, "deepspeed=ds_configs/own.json")
    preset = Variant(3, True, True)
    advice = advise(timed(found, {preset: 1.0}, {preset}))
    assert advice.text.startswith("The run does not fit as it is. ZeRO-3 + offload")
    assert advice.settings == ("deepspeed=ds_configs/zero3_offload.json",)


def test_quantised_and_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path, "Qwen2.5-VL-7B")
    whole, packed = (made(run, f"train.packing={packed}", "train.pack_max_tokens=8192") for packed in ("false", "true"))
    assert packed.shapes.largest.is_packed and packed.run.largest_units > 8192
    assert packed.run.largest.parts["base"] == whole.run.largest.parts["base"]
    monkeypatch.setattr("vlm_dist.estimate.estimate.check_quantization", lambda *a: None)  # bitsandbytes may be missing
    four_bits = made(run, "peft.quantization=nf4")
    assert 0.26 < four_bits.run.largest.parts["base"] / whole.run.largest.parts["base"] < 0.40  # embeddings stay
    assert {row.variant.stage for row in four_bits.rows} == {2}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gpus": 0}, "--gpus 0: expected 1 or more"),
        ({"nodes": -1}, "--nodes -1"),
        ({"memory": 0}, "--gpu-memory 0"),
        ({"gpu": "abacus"}, "--gpu abacus: not known"),
        ({"interconnect": "string"}, "--interconnect string: expected one of nvlink"),
        ({"efficiency": 40}, "--efficiency 40: expected a share"),
    ],
)
def test_wrong_flags_are_named(wrong: dict, message: str) -> None:
    right = {"gpus": 8, "nodes": 1, "memory": None, "gpu": "H100", "interconnect": None, "efficiency": 0.4}
    with pytest.raises(ConfigError, match=message):
        machine_of(**{**right, **wrong})
    assert machine_of(**right).memory_bytes == 80 * GIB
    assert replace(machine_of(**right), gpu="").peak == 989.4e12
