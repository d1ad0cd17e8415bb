"""Every preset trains, and trains the same; hpZ begins with a trial of its second shards, and resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine import tiny
from tests.ranks import Ranks, run_ranks
from vlm_dist.engine import TrainableState, load_deepspeed_json, merge_deepspeed_config, secondary_shards
from vlm_dist.errors import ConfigError

pytestmark = pytest.mark.engine

PRESETS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
STEPS = [[tiny.micro_batch(10 * step + index, image=step != 1) for index in range(4)] for step in range(3)]


def config_of(preset: Path, ranks: Ranks, **changes: Any) -> dict[str, Any]:
    """As a run merges it; made small, since nothing of the tiny model would be partitioned."""
    content = load_deepspeed_json(preset)
    if content["zero_optimization"]["stage"] == 3:
        content["zero_optimization"] |= {"stage3_param_persistence_threshold": 100, **changes}
    merged, _ = merge_deepspeed_config(
        content,
        per_device_train_batch_size=1,
        bf16=False,
        fp16=False,
        max_grad_norm=1.0,
        world_size=ranks.world_size,
        num_trainable=3000,
    )
    return merged


def steps_of(engine: Any, ranks: Ranks, steps: list[list[tiny.Batch]]) -> list[tuple[float, float | None]]:
    results = []
    for batches in steps:
        loss, outcome = tiny.run_step(engine, batches[ranks.rank :: ranks.world_size], tiny.num_targets(batches))
        results.append((loss, outcome.grad_norm))
    return results


def train_all(ranks: Ranks, model: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    states: dict[str, TrainableState | None] = {}
    for preset in PRESETS:
        if "nvme" in preset.stem:
            continue  # needs a disk and libaio
        hpz = {"zero_hpz_partition_size": 2} if "hpz" in preset.stem else {}
        engine = tiny.make_engine(model, config_of(preset, ranks, **hpz))
        results[preset.stem] = steps_of(engine, ranks, STEPS[:2])
        states[preset.stem] = engine.collect_trainable()
        results[f"{preset.stem} goes on"] = steps_of(engine, ranks, STEPS[2:])
        engine.close()
    # hpZ from a checkpoint of another stage, and another stage from one of hpZ
    for preset, other in (("zero3_hpz", "zero2"), ("zero2", "zero3_hpz")):
        path = next(path for path in PRESETS if path.stem == preset)
        hpz = {"zero_hpz_partition_size": 2} if preset == "zero3_hpz" else {}
        engine = tiny.make_engine(model, config_of(path, ranks, **hpz))
        steps_of(engine, ranks, STEPS[1:2])  # second shards of weights that are about to be replaced
        engine.restore_trainable(states[other])
        results[f"{preset} from {other}"] = steps_of(engine, ranks, STEPS[2:])
        engine.close()
    return results


def test_all_presets_train_alike(tmp_path: Path) -> None:
    tiny.compile_cpu_adam()
    model = tiny.save_tiny_vlm(tmp_path / "model")
    for results in run_ranks(train_all, 4, model, timeout_seconds=400):
        for name, got in results.items():
            wanted = results["zero0 goes on" if "on" in name or "from" in name else "zero0"]
            for (loss, norm), (wanted_loss, wanted_norm) in zip(got, wanted, strict=True):
                assert loss == pytest.approx(wanted_loss, rel=2e-5), name
                assert norm == pytest.approx(wanted_norm, rel=2e-5), name


def trials(ranks: Ranks, model: Path) -> list[str]:
    """What DeepSpeed's users have met: second shards that are not the model's, or not those of after the update."""
    messages = []
    config = tiny.ds_config(3, ranks.world_size, zero={"zero_hpz_partition_size": 2})
    gathered = secondary_shards._gathered

    def wrong(parameters: list[Any]) -> Any:
        whole = gathered(parameters)
        if ranks.rank == 1 and parameters[0].ds_secondary_tensor is not None:
            parameters[0].ds_secondary_tensor.add_(0.25)
        return whole

    secondary_shards._gathered = wrong
    try:
        tiny.make_engine(model, config)
    except ConfigError as error:
        messages.append(str(error))
    secondary_shards._gathered = gathered
    engine = tiny.make_engine(model, config)
    engine._zero.invalidate_secondary_tensor = lambda: None  # as a version that forgets to
    try:
        steps_of(engine, ranks, STEPS[:1])
    except ConfigError as error:
        messages.append(str(error))
    engine.close()
    return messages


def test_hpz_that_gives_other_weights_ends_the_start_on_every_rank(tmp_path: Path) -> None:
    model = tiny.save_tiny_vlm(tmp_path / "model")
    for messages in run_ranks(trials, 4, model, timeout_seconds=240):
        assert len(messages) == 2, messages
        assert "zero_optimization.zero_hpz_partition_size: on rank" in messages[0]
        assert "by 2.50e-01); remove the option" in messages[0]
        assert "trainable weights keep shards of before the update" in messages[1]


def test_the_nvme_preset_says_what_this_machine_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (preset,) = [path for path in PRESETS if "nvme" in path.stem]
    with pytest.raises(ConfigError, match="is '/local_nvme', which is not a directory on this node"):
        load_deepspeed_json(preset)
    assert json.loads(preset.read_text())["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
