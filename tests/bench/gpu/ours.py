"""Our trainer by its real command line, and what its log says of it."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.bench.gpu.commands import Command, Outcome
from tests.bench.gpu.models import Checkpoint
from tests.bench.report import ROOT
from vlm_dist.observability.jsonl import read_metrics

WARM_UP_STEPS = 3
PROFILED_STEPS = 1
OUT_OF_MEMORY = 2  # exit code of a configuration that does not do, a micro-batch that does not fit among them
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
#: What is tried where the estimate was too hopeful: some blocks are computed again, then all.
SAFER: tuple[tuple[str, ...], ...] = (("train.gradient_checkpointing_policy.language=14",), ())
MIN_STEPS = 2  # less than so many timed steps are no figure
_IMAGE = [{"type": "image"}, {"type": "text", "text": "{question_column}"}]
_VIDEO = [{"type": "video"}, {"type": "text", "text": "{question_column}"}]


@dataclass(frozen=True)
class Setting:
    """One run of ours.

    Attributes:
        name: for people.
        shards: of the training data.
        pack_tokens: of one pack.
        samples_per_step: of one rank.
        num_steps: timed ones.
        is_video: the samples are clips.
        num_frames: of a clip.
        max_length: of a sample.
    """

    name: str
    shards: Path
    pack_tokens: int
    samples_per_step: int
    num_steps: int
    is_video: bool = False
    num_frames: int = 8
    max_length: int = 8192


@dataclass(frozen=True)
class Measured:
    """What a run of ours came to: medians of the timed steps.

    Attributes:
        steps: lines of metrics.jsonl behind the warm-up.
        settings: what the estimate chose.
        outcome: of the process.
        trace: of the profiled step, if there is one.
        messages: lines of its log that tell what was used.
    """

    steps: list[dict[str, Any]]
    settings: tuple[str, ...]
    outcome: Outcome
    trace: Path | None = None
    messages: list[str] = field(default_factory=list)

    def median(self, name: str) -> float | None:
        """Of one figure; None where no step has it."""
        values = [step[name] for step in self.steps if step.get(name) is not None]
        return statistics.median(values) if values else None

    @property
    def tokens_per_second(self) -> float | None:
        """Real tokens, of all timed steps together: steps differ in their samples."""
        if len(self.steps) < MIN_STEPS:
            return None
        tokens = sum(step["tokens_per_second"] * step["step_seconds"] for step in self.steps)
        seconds: float = sum(step["step_seconds"] for step in self.steps)
        return float(tokens) / seconds

    @property
    def peak_bytes(self) -> float | None:
        """Most that the allocator had taken."""
        return max((step.get("device_reserved_bytes") or 0 for step in self.steps), default=0) or None


def write_run(directory: Path, checkpoint: Checkpoint, setting: Setting, *, num_workers: int) -> Path:
    """Write a run file beside copies of the shipped configs; gives back its path."""
    configs = directory / "configs"
    for folder in ("configs", "ds_configs"):
        shutil.copytree(ROOT / folder, directory / folder, dirs_exist_ok=True)
    content = _VIDEO if setting.is_video else _IMAGE
    run = {
        "model": str(checkpoint.directory),
        "deepspeed": "../ds_configs/zero2.json",
        "overrides": {
            "collator": {
                "data_processing": {"image_data": not setting.is_video, "video_data": setting.is_video},
                "message_format": {
                    "training_messages": [
                        {"role": "user", "content": content},
                        {"role": "assistant", "content": [{"type": "text", "text": "{answer_column}"}]},
                    ]
                },
                "video_processing": {"frame_extraction": {"num_frames": setting.num_frames}},
                "text_processing": {"max_length": setting.max_length},
                "label_masking": {"mask_input_tokens": True},
            },
            "train": {
                "output_dir": str(directory / setting.name),
                "report_to": "none",
                "per_device_train_batch_size": setting.samples_per_step,
                "gradient_accumulation_steps": 1,
                "max_steps": WARM_UP_STEPS + setting.num_steps + 1 + PROFILED_STEPS,
                "num_train_epochs": 1000,
                "packing": True,
                "pack_max_tokens": setting.pack_tokens,
                "logging_steps": 1,
                "eval_steps": 0,
                "save_steps": 0,
                "bf16": True,
                "dataloader_num_workers": num_workers,
                "dataloader_pin_memory": True,
                "profile": {"start_step": WARM_UP_STEPS + setting.num_steps + 1, "num_steps": PROFILED_STEPS},
            },
            "peft": {**LORA, "towers": {"vision": "freeze", "projector": "freeze", "language": "lora"}},
            "data": {
                "index_dir": str(directory / "index"),
                "train": [
                    {
                        "type": "tar",
                        "path": str(setting.shards),
                        "columns": {"video": "mp4"} if setting.is_video else {"image": "jpg"},
                    }
                ],
                "eval": [],
            },
        },
    }
    path = configs / f"{setting.name}.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path


def choose_checkpointing(command: Command, run: Path, memory_gib: float, seconds: float) -> tuple[str, ...]:
    """The settings of gradient checkpointing that `vlm-dist estimate` finds fastest of those that fit.

    Returns:
        `--set` arguments, without the flag; none where it says nothing (all blocks are computed again).
    """
    arguments = ["vlm-dist", "estimate", str(run), "--gpu-memory", f"{memory_gib:.1f}", "--json"]
    outcome = command.script(arguments, seconds, name=f"estimate-{run.stem}")
    if outcome.exit_code != 0:
        print(json.dumps({"note": f"vlm-dist estimate: exit code {outcome.exit_code}\n{outcome.tail}"}), flush=True)
        return ()
    advice = json.loads(outcome.stdout[outcome.stdout.index("{") :])["recommendation"]
    return tuple(setting for setting in advice["settings"] if "gradient_checkpointing" in setting)


def train(command: Command, run: Path, setting: Setting, settings: Sequence[str], seconds: float) -> Measured:
    """Run, and read what was logged; where memory ran out again, with more blocks that are computed again.

    Args:
        command: that starts processes.
        run: of `write_run`.
        setting: that it was written for.
        settings: `--set` arguments.
        seconds: for all of it.
    """
    deadline = command.clock() + seconds
    outcome = None
    for attempt in dict.fromkeys((tuple(settings), *SAFER)):
        output = run.parent.parent / setting.name
        shutil.rmtree(output, ignore_errors=True)
        flags = [word for one in attempt for word in ("--set", one)]
        arguments = ["vlm_dist.train", "--config", str(run), *flags]
        outcome = command.module(arguments, deadline - command.clock(), name=setting.name)
        settings = attempt
        if outcome.exit_code != OUT_OF_MEMORY or "out of memory" not in outcome.stdout:
            break
    assert outcome is not None
    log = run.parent.parent / setting.name / "metrics.jsonl"
    steps = list(read_metrics(log, "train")) if log.exists() else []
    # the step that the profiler starts in is slow, and so are those that it traces
    timed = [step for step in steps if WARM_UP_STEPS < step["step"] <= WARM_UP_STEPS + setting.num_steps]
    traces = sorted((log.parent / "profile").glob("*.json.gz")) if log.parent.exists() else []
    told = ("memory check", "gradient checkpointing", "packs of", "varlen", "out of memory")
    messages = [line.strip() for line in outcome.stdout.splitlines() if any(word in line for word in told)]
    return Measured(timed, tuple(settings), outcome, traces[0] if traces else None, messages)
