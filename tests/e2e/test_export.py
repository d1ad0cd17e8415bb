"""`vlm-dist export`: merged is base + adapter, and what is wrong with an adapter is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.tiny_run import TinyRun, make_tiny_run
from vlm_dist.errors import CheckpointError, VlmDistError
from vlm_dist.export.opening import open_origin
from vlm_dist.export.verify import verified
from vlm_dist.observability.findings import Finding, Level

pytestmark = pytest.mark.e2e

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    made = make_tiny_run(tmp_path_factory.mktemp("export"), num_images=12, num_clips=8)
    finished = made.train("train.max_steps=3", "train.save_steps=2")
    assert finished.exit_code == 0, finished.output
    return made


@pytest.fixture
def inside(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> TinyRun:
    monkeypatch.chdir(run.directory)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return run


def test_merged_loads_without_us_and_is_verified(run: TinyRun) -> None:
    merged = run.command(["vlm-dist", "export", "merge", "run", "-o", "merged"])
    assert merged.exit_code == 0, merged.output
    assert "merging in float32" in merged.stdout and "wrote merged: " in merged.stdout
    directory = run.directory / "merged"
    info = json.loads((directory / "merge_info.json").read_text())
    assert info["base"] == "model" and WEIGHTS in info["adapter_sha256"]
    assert "merged into its weights (bfloat16)" in (directory / "README.md").read_text()
    # the names that the base was published with
    with (
        safe_open(run.directory / "model" / "model.safetensors", framework="pt") as base,
        safe_open(directory / "model.safetensors", framework="pt") as made,
    ):
        assert {*made.keys()} == {*base.keys()}
        assert {made.get_tensor(name).dtype for name in made.keys()} == {torch.bfloat16}  # noqa: SIM118
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]

    told = run.command(["vlm-dist", "export", "verify", "run", "--merged", "merged", "--json"])
    assert told.exit_code == 0, told.output
    found = {one["what"]: one for one in json.loads(told.stdout)["findings"]}
    assert {one["level"] for one in found.values()} == {"ok"}
    assert "rounded once, bit by bit" in found["merged"]["found"]
    assert "checkpoint-3 recorded the same hash" in found["checkpoint"]["found"]
    assert "a fresh process with transformers and PEFT has all" in found["PEFT alone"]["found"]

    again = run.command(["vlm-dist", "export", "merge", "run", "-o", "merged"])
    assert again.exit_code == 5 and "merged is not empty" in again.stderr
    other = run.command(["vlm-dist", "export", "verify", "run", "--which", "best"])
    assert other.exit_code == 5 and "train.metric_for_best_model" in other.stderr


def test_dora_and_places_where_nothing_can_be_written(run: TinyRun) -> None:
    finished = run.train("train.max_steps=2", "train.output_dir=dora", "peft.use_dora=true", "peft.use_rslora=true")
    assert finished.exit_code == 0, finished.output
    told = run.command(["vlm-dist", "export", "verify", "dora"])
    assert told.exit_code == 0, told.output
    file = run.command(["vlm-dist", "export", "merge", "dora", "-o", "configs/tiny.yaml"])
    assert file.exit_code == 5 and "configs/tiny.yaml is a file" in file.stderr
    elsewhere = run.command(["sh", "-c", f"cd / && vlm-dist export verify '{run.directory}/dora'"])
    assert elsewhere.exit_code == 2 and "--base says where it is now" in elsewhere.stderr


def problems(found: list[Finding]) -> str:
    return "\n".join(f"{one.what}: {one.found}" for one in found if one.level is Level.PROBLEM)


def fail(error: VlmDistError) -> Finding:
    return Finding(Level.PROBLEM, "model", str(error), exit_code=error.exit_code)


def damaged(inside: TinyRun, name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """A copy of the adapter with other tensors, beside it."""
    copy = inside.directory / "run" / name
    shutil.copytree(inside.directory / "run" / "adapter", copy)
    save_file(change(load_file(copy / WEIGHTS)), copy / WEIGHTS, metadata={"format": "pt"})
    return copy


def test_names_that_peft_would_leave_out(inside: TinyRun) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key.replace("language_model.layers.0", "language_model.blocks.0"): one for key, one in tensors.items()}

    found = verified(open_origin(damaged(inside, "renamed", rename)), None, fail)
    assert "have names that the model does not know" in problems(found)


def test_an_adapter_that_does_nothing(inside: TinyRun) -> None:
    def empty(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: one * 0 if ".lora_B." in key else one for key, one in tensors.items()}

    said = problems(verified(open_origin(damaged(inside, "empty", empty)), None, fail))
    assert "LoRA B matrices are zero: nothing was learned" in said
    assert "effect: the adapter does not change the logits of images/" in said


def test_a_tower_that_has_learned_nothing_is_a_warning(inside: TinyRun) -> None:
    def blind(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: one * 0 if ".lora_B." in key and "visual" in key else one for key, one in tensors.items()}

    found = verified(open_origin(damaged(inside, "blind", blind)), None, fail)
    assert not problems(found)
    assert any(one.level is Level.WARNING and "freeze it" in one.fix for one in found)


def test_broken_files(inside: TinyRun) -> None:
    copy = inside.directory / "run" / "short"
    shutil.copytree(inside.directory / "run" / "adapter", copy)
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_origin(copy)
    checkpoint = inside.directory / "run" / "checkpoint-9"
    shutil.copytree(inside.directory / "run" / "checkpoint-3", checkpoint)
    tensors = load_file(checkpoint / WEIGHTS)
    save_file({key: one + 1 for key, one in tensors.items()}, checkpoint / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="does not match its hash"):
        open_origin(checkpoint)
    shutil.rmtree(checkpoint)
    with pytest.raises(CheckpointError, match="no such directory"):
        open_origin(Path("nowhere"))


def test_merged_from_another_adapter(inside: TinyRun) -> None:
    from vlm_dist.export.merge import merge

    earlier = open_origin(Path("run/checkpoint-2"))
    merge(earlier, Path("earlier"), dtype="float32")
    said = problems(verified(open_origin(Path("run")), Path("earlier"), fail))
    assert "weights are not base + adapter" in said


def test_another_base(inside: TinyRun) -> None:
    base = inside.directory / "narrow"
    shutil.copytree(inside.directory / "model", base)
    config = json.loads((base / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        if "intermediate_size" in part:
            part["intermediate_size"] = 32
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        if "mlp.gate_proj" in name or "mlp.up_proj" in name:
            tensors[name] = tensor[:32].clone()
        elif "mlp.down_proj" in name and "visual" not in name:
            tensors[name] = tensor[:, :32].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    origin = open_origin(Path("run"), base="narrow")
    assert "does not fit narrow" in problems(verified(origin, None, fail))
