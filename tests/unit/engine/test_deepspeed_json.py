"""What DeepSpeed would swallow in silence is refused, with file, line, key and a way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm_dist.engine import load_deepspeed_json, merge_deepspeed_config
from vlm_dist.errors import ConfigError

SHIPPED = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))
RUN = {"per_device_train_batch_size": 4, "bf16": True, "fp16": False, "max_grad_norm": 1.0}


def load(tmp_path: Path, content: Any) -> dict[str, Any]:
    path = tmp_path / "zero.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2))
    return load_deepspeed_json(path)


def problems(tmp_path: Path, content: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, content)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **keys}}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_files_are_valid(path: Path) -> None:
    assert load_deepspeed_json(path)["zero_optimization"]["stage"] == int(path.stem.removeprefix("zero")[0])


def test_all_four_are_shipped() -> None:
    assert [path.stem for path in SHIPPED] == ["zero1", "zero2", "zero3", "zero3_offload"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"zero_optimisation": {"stage": 3}, **zero()}, "zero.json:2: zero_optimisation is not a DeepSpeed key; did "
         "you mean zero_optimization?"),
        (zero(stage3_prefetch_buket_size=1), "zero.json:4: zero_optimization.stage3_prefetch_buket_size is not a "
         "DeepSpeed key; did you mean stage3_prefetch_bucket_size?"),
        (zero(offload_param={"device": "cpu", "pin_memry": True}), "zero_optimization.offload_param.pin_memry is not a "
         "DeepSpeed key; did you mean pin_memory?"),
        (zero(reduce_bucket_size="auto"), 'zero_optimization.reduce_bucket_size is "auto"; write a value, or leave'),
        ({**zero(), "gradient_clipping": "auto"}, "gradient_clipping is train_config.yaml: max_grad_norm"),
        ({**zero(), "train_batch_size": 8}, "train_batch_size follows from train_config.yaml: per_device_train_batch"),
        ({**zero(), "bf16": {"enabled": True}}, "bf16 is train_config.yaml: bf16; remove it here"),
        ({**zero(), "optimizer": {"type": "AdamW"}}, "optimizer is train_config.yaml: learning_rate"),
        ({**zero(), "scheduler": {"type": "WarmupLR"}}, "scheduler is train_config.yaml: lr_scheduler_type"),
        ({**zero(), "gradient_clipping": 1.0}, "gradient_clipping is train_config.yaml: max_grad_norm"),
        ({**zero(), "gradient_accumulation_steps": 4}, "is train_config.yaml: gradient_accumulation_steps"),
        ({**zero(), "compile": {"deepcompile": True}}, "compile is not yet supported"),
        ({**zero(), "steps_per_print": True}, "steps_per_print is True, expected int"),
        ({**zero(), "wall_clock_breakdown": 1}, "wall_clock_breakdown is 1, expected bool"),
        ({**zero(), "flops_profiler": {"profile_stepp": 1}}, "did you mean profile_step?"),
        ({"zero_optimization": {"stage": 0}}, "is 0, expected 1, 2 or 3"),
        ({"zero_optimization": {}}, "is 0, expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": 5}}, "zero_optimization.stage is 5"),
        ({"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 5}}, "applies to stage 3 only, and"),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, "overlap_comm needs stage 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "needs stage 3"),
        (zero(offload_param={"device": "nvme"}), 'offload_param.device is "nvme", which is not yet supported'),
        (zero(offload_optimizer={"device": "gpu"}), "zero_optimization.offload_optimizer.device is 'gpu'"),
        (zero(reduce_bucket_size=-1), "zero_optimization.reduce_bucket_size is -1"),
        (zero(stage3_gather_16bit_weights_on_model_save=True), "has no effect here"),
        (zero(mics_shard_size=4), "zero_optimization.mics_shard_size is not a DeepSpeed key"),
        (zero(zero_quantized_gradients=True), "zero_quantized_gradients is not yet supported"),
        ({}, "zero_optimization is missing"),
        ([], "expected a JSON object, got list"),
        ('{\n "zero_optimization": {"stage": 2},\n}', "zero.json:3: not valid JSON"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "key stage appears twice"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, content: Any, expected: str) -> None:
    lines = problems(tmp_path, content)
    assert len(lines) == 1, lines
    assert expected in lines[0]


def test_all_problems_at_once(tmp_path: Path) -> None:
    lines = problems(tmp_path, {**zero(stages=1, overlap_comm="auto"), "fp16": {}, "zro": 1})
    assert len(lines) == 4


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read"):
        load_deepspeed_json(tmp_path / "none.json")


def test_merge_derives_what_follows_and_says_why() -> None:
    merged, derived = merge_deepspeed_config(zero(), world_size=16, num_nodes=2, num_trainable=1_234_567, **RUN)
    assert merged["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 1_234_567,
        "zero_hpz_partition_size": 8,
    }
    assert [str(value) for value in derived] == [
        "zero_optimization.reduce_bucket_size = 1234567 (1,234,567 trainable parameters; allocated up front)",
        "zero_optimization.zero_hpz_partition_size = 8 (GPUs per node: frozen weights are gathered inside the node)",
    ]
    assert merged["gradient_accumulation_steps"] == 1
    assert merged["train_micro_batch_size_per_gpu"] == 4
    assert merged["gradient_clipping"] == 1.0
    assert merged["bf16"] == {"enabled": True}


def test_what_the_file_says_is_not_derived() -> None:
    content = zero(reduce_bucket_size=7, zero_hpz_partition_size=4)
    merged, derived = merge_deepspeed_config(content, world_size=16, num_nodes=2, num_trainable=9, **RUN)
    assert derived == []
    assert merged["zero_optimization"]["reduce_bucket_size"] == 7
    assert "train_micro_batch_size_per_gpu" not in content  # merging never changes its input
    with pytest.raises(ConfigError, match="3 does not divide the 16 ranks"):
        merge_deepspeed_config(zero(zero_hpz_partition_size=3), world_size=16, **RUN)


def test_before_the_model_is_known_nothing_follows_from_it() -> None:
    merged, derived = merge_deepspeed_config({"zero_optimization": {"stage": 2}}, world_size=8, **RUN)
    assert derived == []
    assert merged["zero_optimization"] == {"stage": 2}
