"""What DeepSpeed would swallow in silence is refused, with file, line, key and a way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm_dist.engine import deepspeed_json, load_deepspeed_json, merge_deepspeed_config
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
def test_the_shipped_files_are_valid_and_say_what_they_are_for(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = path.read_text()
    if "nvme" in path.stem:  # what it needs of a machine is another test's
        monkeypatch.setattr("vlm_dist.engine.nvme.missing_for_aio", lambda: None)
        text = text.replace("/local_nvme", str(tmp_path))
    assert json.loads(text)["_comment"]
    loaded = load(tmp_path, text)
    assert loaded["zero_optimization"]["stage"] == int(path.stem.removeprefix("zero")[0])
    assert "_comment" not in json.dumps(loaded)
    assert f"`{path.name}`" in (path.parent / "README.md").read_text()


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
        ({"zero_optimization": {"stage": 0, "overlap_comm": True}}, "overlap_comm has no effect at stage 0"),
        ({"zero_optimization": {}}, "zero_optimization.stage is missing"),
        ({**zero(), "_comment": 5}, "_comment is 5, expected a line of text or a list of them"),
        (zero(_comment=["a line", 7]), "zero_optimization._comment is ['a line', 7], expected a line"),
        ({**zero(), "aio": {"queue_depth": 8}}, 'aio has no effect: nothing is offloaded to "nvme"'),
        ({**zero(), "steps_per_prnt": 5}, "did you mean steps_per_print?"),
        ({"zero_optimization": {"stage": 5}}, "zero_optimization.stage is 5"),
        ({"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 5}}, "applies to stage 3 only, and"),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, "overlap_comm needs stage 2 or 3"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "needs stage 2 or 3"),
        (zero(offload_param={"device": "nvme"}), "offload_param.nvme_path is missing"),
        (zero(offload_param={"device": "nvme", "nvme_path": "/no/such/disk"}), "which is not a directory on this node"),
        (zero(offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}), "where no checkpoint reaches them"),
        (zero(zero_quantized_weights=True), "every weight that a forward meets would be off by 0.9%"),
        (zero(zero_quantized_nontrainable_weights=True), "DeepSpeed has it for float16 only"),
        (zero(offload_optimizer={"device": "gpu"}), "zero_optimization.offload_optimizer.device is 'gpu'"),
        (zero(reduce_bucket_size=-1), "zero_optimization.reduce_bucket_size is -1"),
        (zero(stage3_gather_16bit_weights_on_model_save=True), "has no effect here"),
        (zero(mics_shard_size=4), "zero_optimization.mics_shard_size is not a DeepSpeed key"),
        (zero(zero_quantized_gradients=True), "zero_quantized_gradients is not supported"),
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


def test_nvme_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that links nothing is a machine without libaio; no compiler at all is another message."""
    wanted = {"device": "nvme", "nvme_path": str(tmp_path)}
    content = {**zero(offload_param=wanted), "aio": {"queue_depht": 8}}
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    (tmp_path / "ninja").symlink_to(compiler)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CXX", raising=False)
    lines = problems(tmp_path, content)
    assert len(lines) == 2, lines
    assert "aio.queue_depht is not a DeepSpeed key; did you mean queue_depth?" in lines[0]
    assert "libaio is missing on this node (Debian: apt install libaio-dev" in lines[1]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "a C++ compiler is missing on this node" in problems(tmp_path, content)[1]


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


def test_hpz_follows_from_several_nodes_at_stage_3_only() -> None:
    for stage, num_nodes, expected in ((3, 1, None), (3, 2, 8), (2, 2, None), (0, 2, None)):
        content = {"zero_optimization": {"stage": stage}}
        merged, derived = merge_deepspeed_config(
            content, world_size=16, num_nodes=num_nodes, num_trainable=5 if stage else None, **RUN
        )
        assert merged["zero_optimization"].get("zero_hpz_partition_size") == expected, (stage, num_nodes)
        assert any("zero_hpz_partition_size" in str(value) for value in derived) == (expected is not None)


def test_before_the_model_is_known_nothing_follows_from_it() -> None:
    merged, derived = merge_deepspeed_config({"zero_optimization": {"stage": 2}}, world_size=8, **RUN)
    assert derived == []
    assert merged["zero_optimization"] == {"stage": 2}


def test_the_docs_name_every_key_that_is_refused_or_derived() -> None:
    page = (Path(__file__).parents[3] / "docs" / "zero.md").read_text()
    keys = [*deepspeed_json.OWNED, *deepspeed_json.NOT_YET, *deepspeed_json.ZERO_REFUSED]
    _, derived = merge_deepspeed_config(zero(), world_size=16, num_nodes=2, num_trainable=5, **RUN)
    keys += [value.key.rsplit(".", 1)[-1] for value in derived]
    assert [key for key in keys if f"`{key}`" not in page] == []
