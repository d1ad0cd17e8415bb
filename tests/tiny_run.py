"""A complete run in a directory (tiny Qwen2-VL, shards, config files), and the real command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import yaml

from tests.bench.gpu.samples import encode_clip as encode_clip_with_opencv
from vlm_dist.data.shards.writer import ShardWriter
from vlm_dist.demo.digits import encode_clip, encode_png
from vlm_dist.demo.tiny_model import TinyShape, save_tiny_qwen2_vl
from vlm_dist.distributed.group import free_port

ROOT = Path(__file__).parent.parent

#: Bigger adapters than 1e5 elements are what ZeRO-3 partitions by default; tests set the threshold to 0 instead.
SHAPE = TinyShape(hidden_size=32, intermediate_size=64, num_layers=2, vision_dim=32, vision_depth=1)


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


@dataclass(frozen=True)
class TinyRun:
    """A working directory in which the commands of the README work."""

    directory: Path

    @property
    def config(self) -> Path:
        return self.directory / "configs" / "tiny.yaml"

    def train(self, *overrides: str, processes: int = 0, timeout_seconds: float = 240) -> Finished:
        """Run the trainer as a user does: plain Python with 0 processes, else under `deepspeed --num_gpus`."""
        return self.command(self.train_command(*overrides, processes=processes), timeout_seconds)

    def train_command(self, *overrides: str, processes: int = 0) -> list[str]:
        """The command line of `train`."""
        launcher: list[str] = [sys.executable]
        if processes:
            launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(processes)]
            launcher += ["--master_port", str(free_port())]
        command = [*launcher, "-m", "vlm_dist.train", "--config", str(self.config)]
        for override in overrides:
            command += ["--set", override]
        return command

    def environment(self) -> dict[str, str]:
        """The environment of commands: that of a user who has just logged in, offline."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "WANDB"))}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
        return environment

    def command(self, command: Sequence[str], timeout_seconds: float = 240) -> Finished:
        """Run any command in the working directory."""
        ended = subprocess.run(
            list(command),
            cwd=self.directory,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )
        return Finished(ended.returncode, ended.stdout, ended.stderr)

    def metrics(self, output_dir: str, kind: str = "train") -> list[dict]:
        """Lines of metrics.jsonl of one kind."""
        from vlm_dist.observability.jsonl import read_metrics

        return list(read_metrics(self.directory / output_dir / "metrics.jsonl", kind))

    def losses(self, output_dir: str) -> dict[int, float]:
        """Loss by position; logged exactly, so that equality means equality of bits."""
        return {record["step"]: record["loss"] for record in self.metrics(output_dir)}


def wait_for_text(log: Path, text: str, writer: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Until a file has a text; the command that writes it must not end before."""
    deadline = time.monotonic() + seconds
    while text not in (said := log.read_text(errors="replace")):
        assert writer.poll() is None and time.monotonic() < deadline, said
        time.sleep(0.2)


def make_tiny_run(
    directory: Path,
    *,
    num_images: int = 40,
    num_clips: int = 8,
    dtype: torch.dtype = torch.float32,
    shape: TinyShape = SHAPE,
) -> TinyRun:
    """Write model, shards and configs. Pictures have different sizes and answers different lengths.

    Args:
        directory: of the run; becomes the working directory of its commands.
        num_images: of the training source `images`; the held-out source has 5.
        num_clips: of the training source `clips`; the held-out source has 3.
        dtype: of the checkpoint, and of `torch_dtype`; bf16 is on for bfloat16.
        shape: of the model.
    """
    save_tiny_qwen2_vl(directory / "model", shape, dtype=dtype)
    # PyAV, which a GPU machine may lack, writes better clips of a few frames
    encode = encode_clip if find_spec("av") is not None else encode_clip_with_opencv
    rng = np.random.default_rng(0)
    for name, count in (("images", num_images), ("images-heldout", 5)):
        with ShardWriter(directory / "data" / name, prefix="images", max_samples=16) as writer:
            for number in range(count):
                picture = rng.integers(
                    0, 255, (int(rng.integers(20, 90)), int(rng.integers(20, 90)), 3), dtype=np.uint8
                )
                answer = "digit " * int(rng.integers(0, 6)) + str(number % 10)
                text = {"question": "Which digit is this?", "answer": answer, "video": None}
                writer.write({"__key__": f"{number:06d}", "png": encode_png(picture), "json": text})
    for name, count in (("clips", num_clips), ("clips-heldout", 3)):
        with ShardWriter(directory / "data" / name, prefix="clips", max_samples=16) as writer:
            for number in range(count):
                frames = [rng.integers(0, 255, (56, 56, 3), dtype=np.uint8) for _ in range(8)]
                text = {"question": "Which digits are shown?", "answer": str(number), "image": None}
                writer.write({"__key__": f"{number:06d}", "mp4": encode(frames), "json": text})
    write_configs(directory, dtype)
    return TinyRun(directory)


def write_configs(directory: Path, dtype: torch.dtype) -> None:
    """Copy the shipped configs, and write configs/tiny.yaml, which overrides what a small machine needs."""
    for folder in ("configs", "ds_configs"):
        shutil.copytree(ROOT / folder, directory / folder, dirs_exist_ok=True)
    for stage in (2, 3):
        preset = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
        if stage == 3:
            preset["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (directory / "ds_configs" / f"tiny{stage}.json").write_text(json.dumps(preset))
    is_bf16 = dtype is torch.bfloat16
    run = {
        "model": "model",
        "deepspeed": "../ds_configs/tiny2.json",
        "overrides": {
            "model": {"loading_params": {"device_map": None, "torch_dtype": "bfloat16" if is_bf16 else "float32"}},
            "collator": {
                "data_processing": {"image_data": True, "video_data": True},
                "message_format": {
                    "training_messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "image"},
                                {"type": "video"},
                                {"type": "text", "text": "{question_column}"},
                            ],
                        },
                        {"role": "assistant", "content": [{"type": "text", "text": "{answer_column}"}]},
                    ]
                },
                "video_processing": {"frame_extraction": {"num_frames": 4}},
                "text_processing": {"max_length": 256},
                "label_masking": {"mask_input_tokens": True},
            },
            "train": {
                "output_dir": "run",
                "report_to": "none",
                "per_device_train_batch_size": 2,
                "per_device_eval_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "max_steps": 6,
                "learning_rate": 1e-3,
                "bf16": is_bf16,
                "logging_steps": 1,
                "eval_steps": 0,
                "save_steps": 0,
                "dataloader_num_workers": 0,
            },
            "peft": {"r": 8, "lora_alpha": 16},
            "data": {
                "index_dir": "index",
                "train": [
                    {"name": "images", "type": "tar", "path": "data/images", "columns": {"image": "png"}},
                    {"name": "clips", "type": "tar", "path": "data/clips", "columns": {"video": "mp4"}},
                ],
                "eval": [
                    {"name": "images", "type": "tar", "path": "data/images-heldout", "columns": {"image": "png"}},
                    {"name": "clips", "type": "tar", "path": "data/clips-heldout", "columns": {"video": "mp4"}},
                ],
            },
        },
    }
    (directory / "configs" / "tiny.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
