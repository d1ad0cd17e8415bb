"""Resumed = uninterrupted, bit for bit, through the real command line, with dropout on.

The undisturbed runs never save, evaluate or stop before their end, and read their data in the training process. What
they are compared with does all of these things. 45 samples in steps of 8: the last step of an epoch has empty slots,
one micro-batch of it is empty altogether, and 12 steps are two epochs.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2VLForConditionalGeneration

from tests.numerics.finished_runs import assert_same_bits, checkpoints, figures, masters, train
from tests.tiny_run import ROOT, TinyRun, make_tiny_run
from vlm_dist.build import make_materialisers, make_processor, open_sources_alone
from vlm_dist.config import load_run
from vlm_dist.data.types import MicroBatch, MicroBatchJob, SampleRef
from vlm_dist.distributed.group import free_port
from vlm_dist.errors import ExitCode

pytestmark = [pytest.mark.numerics, pytest.mark.e2e]

NUM_STEPS = 12
BF16 = (
    "train.bf16=true",
    "model.loading_params.torch_dtype=bfloat16",
    "peft.lora_dropout=0.05",
    f"train.max_steps={NUM_STEPS}",
)
ZERO3 = "deepspeed=ds_configs/tiny3.json"
FINAL = f"checkpoint-{NUM_STEPS}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("resume"), num_images=37)


@pytest.fixture(scope="module")
def undisturbed(run: TinyRun) -> Path:
    train(run, "undisturbed", *BF16, processes=2)
    return run.directory / "undisturbed"


def test_stopped_and_resumed_with_other_workers(run: TinyRun, undisturbed: Path) -> None:
    stopped = train(run, "stopped", *BF16, "train.stop_at_step=3", processes=2)
    assert f"at step 3 of {NUM_STEPS}; continue with --set train.resume=auto" in stopped.output
    assert checkpoints(run, "stopped") == ["checkpoint-3"]
    assert not (run.directory / "stopped" / "adapter").exists()
    early = figures(run, "stopped")

    resumed = train(run, "stopped", *BF16, "train.resume=auto", "train.dataloader_num_workers=2", processes=2)
    assert f"resumed from stopped/checkpoint-3 at step 3 of {NUM_STEPS}" in resumed.output
    wanted = figures(run, "undisturbed")
    assert len(wanted) == NUM_STEPS
    assert early == {step: wanted[step] for step in (1, 2, 3)}
    assert figures(run, "stopped") == wanted
    assert wanted[6]["null_slots/tail"] == 3
    assert_same_bits(run.directory / "stopped" / FINAL, undisturbed / FINAL)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        published = (run.directory / "stopped" / "adapter" / name).read_bytes()
        assert published == (undisturbed / "adapter" / name).read_bytes(), name


def test_zero3_evaluated_saved_stopped_and_resumed(run: TinyRun) -> None:
    train(run, "undisturbed3", *BF16, ZERO3, processes=2)
    often = ("train.eval_steps=3", "train.save_steps=1", "train.save_total_limit=2", "train.eval_on_start=true")
    train(run, "disturbed3", *BF16, ZERO3, *often, "train.stop_at_step=3", processes=2)
    assert checkpoints(run, "disturbed3") == ["checkpoint-2", "checkpoint-3"]
    more = ("train.resume=auto", "train.dataloader_num_workers=2")
    train(run, "disturbed3", *BF16, ZERO3, *often, *more, processes=2)
    assert checkpoints(run, "disturbed3") == [f"checkpoint-{NUM_STEPS - 1}", FINAL]
    evaluated = run.metrics("disturbed3", "eval")
    assert [record["step"] for record in evaluated] == [0, 3, 6, 9, 12]
    assert {(record["images/num_samples"], record["clips/num_samples"]) for record in evaluated} == {(5, 3)}
    assert run.metrics("undisturbed3", "eval") == []
    assert figures(run, "disturbed3") == figures(run, "undisturbed3")
    assert_same_bits(run.directory / "disturbed3" / FINAL, run.directory / "undisturbed3" / FINAL)


def logits_of(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Logits [B, T, V] in evaluation mode."""
    inputs = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.inputs.items()}
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_the_adapter_is_what_was_trained(run: TinyRun, undisturbed: Path) -> None:
    """PEFT loads the published adapter; it computes what the masters, rounded to the training dtype, compute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.directory)
        config = load_run(run.config, BF16)
        sources = open_sources_alone(config, "eval")
        processor, family = make_processor(config)
        materialise = make_materialisers(config, [], sources, processor, family)
        batch = materialise(MicroBatchJob(0, 0, (SampleRef(0, 1), SampleRef(1, 0)), purpose="eval"))
    assert {"pixel_values", "pixel_values_videos"} <= batch.inputs.keys()

    def base() -> Qwen2VLForConditionalGeneration:
        return Qwen2VLForConditionalGeneration.from_pretrained(run.directory / "model", dtype=torch.bfloat16)

    wanted = masters(undisturbed / FINAL)
    assert all(float(tensor.abs().max()) > 0 for name, tensor in wanted.items() if "lora_B" in name)
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    by_hand = get_peft_model(base(), adapter, autocast_adapter_dtype=False)
    weights = {name: p for name, p in by_hand.named_parameters() if p.requires_grad}
    assert weights.keys() == wanted.keys()
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(wanted[name])
    expected = logits_of(by_hand, batch)
    assert float((expected - logits_of(base(), batch)).abs().max()) > 0.1
    for directory in (undisturbed / "adapter", undisturbed / FINAL):
        loaded = PeftModel.from_pretrained(base(), directory, autocast_adapter_dtype=False)
        assert torch.equal(logits_of(loaded, batch), expected), directory

    num_trainable = sum(tensor.numel() for tensor in wanted.values())
    header_bytes = 40_000  # names, shapes and offsets, by which a real model's size is not noticed
    assert (undisturbed / FINAL / "adapter_model.safetensors").stat().st_size <= 2 * num_trainable + header_bytes
    assert (undisturbed / FINAL / "training_state.safetensors").stat().st_size <= 12 * num_trainable + header_bytes
    size = sum(path.stat().st_size for path in (undisturbed / FINAL).iterdir())
    assert size <= 16 * num_trainable + 1_000_000


def slowed(run: TinyRun) -> dict[str, str]:
    """An environment in which a step takes long enough for a signal to come in its midst."""
    environment = run.environment() | {"FAULT": "slow:0:forward:0"}
    return environment | {"PYTHONPATH": f"{ROOT / 'tests/e2e/preload_faults'}:{environment['PYTHONPATH']}"}


def rank_processes(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks that a `deepspeed` command has started."""
    found = psutil.Process(launcher.pid).children(recursive=True)
    return [process for process in found if any(arg.startswith("--local_rank=") for arg in process.cmdline())]


def start_ranks(run: TinyRun, overrides: list[str]) -> list[subprocess.Popen[str]]:
    """Start two ranks as children of our own, as srun would, so that each one's exit code is seen."""
    environment = slowed(run) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            run.train_command(*overrides),
            cwd=run.directory,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def wait_for_step(run: TinyRun, output_dir: str, beyond: int, process: subprocess.Popen[str]) -> None:
    """Wait until a step after this position is in the log."""
    path = run.directory / output_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() or len(run.metrics(output_dir)) <= beyond:
        assert process.poll() is None, f"ended before step {beyond + 1}:\n{process.communicate()[0][-4000:]}"
        assert time.monotonic() < deadline, f"step {beyond + 1} did not come"
        time.sleep(0.01)


def end(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Wait for processes and give back what they printed; nothing is left behind."""
    try:
        return [process.communicate(timeout=90)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


def stopped_position(run: TinyRun, output_dir: str, output: str) -> int:
    """Where a signal stopped the run; its newest checkpoint and its log end there."""
    told = re.findall(rf"by a signal at step (\d+) of {NUM_STEPS}; continue with", output)
    assert len(told) == 1, output[-4000:]
    assert checkpoints(run, output_dir)[-1] == f"checkpoint-{told[0]}"
    assert len(figures(run, output_dir)) == int(told[0])
    return int(told[0])


def test_preempted_three_times(run: TinyRun, undisturbed: Path) -> None:
    """SIGTERM to both ranks, SIGUSR1 to one of them, SIGINT to both (Ctrl-C), each resumed by the next."""
    overrides = [*BF16, "train.output_dir=preempted", "train.resume=auto"]
    position = 0
    for number, which in ((signal.SIGTERM, slice(0, 2)), (signal.SIGUSR1, slice(1, 2))):
        launcher = subprocess.Popen(
            run.train_command(*overrides, processes=2),
            cwd=run.directory,
            env=slowed(run),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        ranks: list[psutil.Process] = []
        try:
            wait_for_step(run, "preempted", position, launcher)
            ranks = sorted(rank_processes(launcher), key=lambda process: process.cmdline())
            assert len(ranks) == 2
            for process in ranks[which]:
                os.kill(process.pid, number)
        finally:
            (output,) = end([launcher])
            for process in ranks:
                if process.is_running():
                    process.kill()
        assert launcher.returncode == ExitCode.PREEMPTED, output[-4000:]
        assert "Traceback" not in output
        stopped = stopped_position(run, "preempted", output)
        assert position < stopped < NUM_STEPS
        position = stopped

    processes = start_ranks(run, overrides)
    try:
        wait_for_step(run, "preempted", position, processes[0])
        for process in processes:
            process.send_signal(signal.SIGINT)
    finally:
        outputs = end(processes)
    assert [process.returncode for process in processes] == [ExitCode.PREEMPTED] * 2, outputs
    stopped = stopped_position(run, "preempted", outputs[0])
    assert position < stopped < NUM_STEPS

    train(run, "preempted", *BF16, "train.resume=auto", processes=2)
    assert figures(run, "preempted") == figures(run, "undisturbed")
    assert_same_bits(run.directory / "preempted" / FINAL, undisturbed / FINAL)
    assert checkpoints(run, "preempted") == [f"checkpoint-{stopped}", FINAL]
