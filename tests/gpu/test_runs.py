"""Whole runs through the real command line on a GPU: stages, resuming, packs, evaluation, 4 bits, several GPUs."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.conftest import cuda, needs_gpu
from tests.tiny_run import Finished, TinyRun, make_tiny_run
from vlm_dist.model.devices import peak_flops

pytestmark = pytest.mark.e2e

NUM_STEPS = 4
BASIC = (f"train.max_steps={NUM_STEPS}", "peft.lora_dropout=0", "train.save_steps=2", "data.index_dir=index")
#: Of a loss in bfloat16 whose sums were taken in another order.
TOLERANCE = 2e-2
FLOAT32 = ("train.bf16=false", "model.loading_params.torch_dtype=float32")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("gpu"), num_images=16, num_clips=4, dtype=torch.bfloat16)


def train(run: TinyRun, output_dir: str, *overrides: str, processes: int = 1) -> Finished:
    finished = run.train(*BASIC, f"train.output_dir={output_dir}", *overrides, processes=processes)
    assert finished.exit_code == 0, finished.output
    return finished


def losses(run: TinyRun, output_dir: str) -> list[float]:
    found = run.losses(output_dir)
    assert list(found) == list(range(1, NUM_STEPS + 1)) and all(map(math.isfinite, found.values()))
    return list(found.values())


@pytest.fixture(scope="module")
def on_cpu(run: TinyRun) -> list[float]:
    """Of the same run in float32, without a GPU."""
    arguments = [*BASIC, *FLOAT32, "train.output_dir=cpu"]
    command = ["env", "CUDA_VISIBLE_DEVICES=", "DS_ACCELERATOR=cpu", *run.train_command(*arguments)]
    finished = run.command(command)
    assert finished.exit_code == 0, finished.output
    return losses(run, "cpu")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_learns_and_resumes(run: TinyRun, place: str, on_cpu: list[float], stage: int) -> None:
    name = f"{place}-{stage}"
    settings = (f"deepspeed=ds_configs/{'tiny' if stage > 1 else 'zero'}{stage}.json",)
    stopped = train(run, name, *settings, "train.stop_at_step=2")
    resumed = train(run, name, *settings, "train.resume=auto")
    assert losses(run, name) == pytest.approx(on_cpu, rel=TOLERANCE)
    assert "checkpoint-2" in resumed.output and "checkpoint-2" in stopped.output
    if place == "cuda":
        assert "memory check" in stopped.output  # which is on by itself there
        last = run.metrics(name)[-1]
        assert last["device_memory_bytes"] > 0
        assert ("mfu" in last) == (peak_flops(torch.cuda.get_device_name()) is not None)


@pytest.mark.parametrize("attention", ["null", "sdpa", "flash_attention_2"])
def test_packs_learn_what_padded_rows_learn(run: TinyRun, place: str, attention: str) -> None:
    if attention == "flash_attention_2" and (place == "cpu" or importlib.util.find_spec("flash_attn") is None):
        pytest.skip("flash-attn is not installed, or there is no GPU")
    shuffled = "train.group_by_length=false"  # packing has the steps of a shuffled run
    if not (run.directory / f"{place}-padded").exists():
        train(run, f"{place}-padded", shuffled)
    name = f"{place}-{attention}"
    train(run, name, shuffled, "train.packing=true", f"model.loading_params.attn_implementation={attention}")
    assert losses(run, name) == pytest.approx(losses(run, f"{place}-padded"), rel=TOLERANCE)


def test_evaluation_generation_and_pinned_memory(run: TinyRun, place: str) -> None:
    """With worker processes, whose batches go through page-locked memory."""
    name = f"{place}-evaluated"
    settings = ("train.eval_steps=2", "train.predict_with_generate=true", "train.generation_max_new_tokens=4")
    train(run, name, *settings, "train.dataloader_num_workers=1", "train.dataloader_pin_memory=true")
    plain = f"{place}-plain"
    train(run, plain)
    assert losses(run, name) == pytest.approx(losses(run, plain), rel=TOLERANCE)
    evaluated = run.metrics(name, "eval")
    assert [record["step"] for record in evaluated] == [2, 4]
    for record in evaluated:
        assert math.isfinite(record["overall/loss"]) and 0 <= record["overall/exact_match"] <= 1


def test_compiled_blocks(run: TinyRun, place: str) -> None:
    backend = "inductor" if place == "cuda" else "aot_eager"
    train(run, f"{place}-as-it-is")
    settings = ("train.torch_compile=true", f"train.torch_compile_backend={backend}")
    finished = train(run, f"{place}-compiled", *settings)
    assert f"torch.compile ({backend}): language: 2 of 2 blocks" in finished.output
    assert losses(run, f"{place}-compiled") == pytest.approx(losses(run, f"{place}-as-it-is"), rel=TOLERANCE)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_base_in_4_bits(run: TinyRun, place: str, on_cpu: list[float]) -> None:
    train(run, f"{place}-nf4", "peft.quantization=nf4")
    # 4 bits change a random model's answers more than bfloat16 does
    assert losses(run, f"{place}-nf4") == pytest.approx(on_cpu, rel=0.3)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=pytest.mark.long), cuda(count=2)])
def test_two_gpus_learn_what_one_learns(run: TinyRun, backend: str, stage: int) -> None:
    """Over NCCL; the global batch is the same, in half as many micro-batches."""
    name, settings = f"{backend}-{stage}", f"deepspeed=ds_configs/tiny{stage}.json"
    halved = "train.gradient_accumulation_steps=1"
    train(run, f"{name}-one", settings)
    train(run, f"{name}-two", settings, halved, processes=2)
    assert losses(run, f"{name}-two") == pytest.approx(losses(run, f"{name}-one"), rel=TOLERANCE)


@needs_gpu
def test_no_memory_left_on_the_gpu_is_told(run: TinyRun) -> None:
    """Another process, this one, holds nearly all of it; the run cannot know before it tries."""
    free, _ = torch.cuda.mem_get_info()
    held: Any = torch.empty(max(0, free - (2500 << 20)), dtype=torch.uint8, device="cuda")
    settings = (
        "train.per_device_train_batch_size=8192",
        "train.gradient_accumulation_steps=1",
        "train.gradient_checkpointing=false",
        "train.output_dir=too-large",
    )
    finished = run.train(*BASIC, *settings, processes=1)
    del held
    torch.cuda.empty_cache()
    assert finished.exit_code == 2, finished.output
    assert "out of memory: memory check before the first step" in finished.output
    assert "GiB of the GPU" in finished.output and "what to change, in this order" in finished.output
    assert "Traceback" not in finished.output
    assert not list(Path(run.directory / "too-large").glob("checkpoint-*"))
