"""What the demo claims, read from what the run left behind and checked with PEFT alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from vlm_dist.demo.answer_format import SYSTEM_PROMPT
from vlm_dist.demo.digits import IMAGE_QUESTION, DigitSplit
from vlm_dist.errors import DataError
from vlm_dist.observability.jsonl import read_metrics

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BATCH_SIZE = 64
MAX_NEW_TOKENS = 6

#: The command that loads the adapter, for the demo's last line.
LOAD_COMMAND = (
    '{python} -c "from transformers import Qwen2VLForConditionalGeneration as Base; from peft import PeftModel; '
    "model = PeftModel.from_pretrained(Base.from_pretrained('{base}', dtype='auto'), '{adapter}'); "
    'print(model.active_peft_config)"'
)


@dataclass(frozen=True)
class Scores:
    """Exact match by source at one step."""

    step: int
    exact_match: Mapping[str, float]


@dataclass(frozen=True)
class RunRecord:
    """What `metrics.jsonl` tells of a run."""

    base: Scores
    tuned: Scores
    final_loss: float  # nats per target token, mean of the last window
    num_steps: int


@dataclass(frozen=True)
class AdapterProof:
    """The adapter as a user of PEFT meets it."""

    path: Path
    num_parameters: int
    parameter_bytes: int  # in the adapter's dtype
    file_bytes: int  # of adapter_model.safetensors
    images_exact_match: float  # over the held-out pictures, without any code of the trainer


def read_run(metrics_file: Path, sources: Sequence[str]) -> RunRecord:
    """Read base and tuned scores, and the final loss.

    Raises:
        DataError: an evaluation is missing.
    """
    evaluations = list(read_metrics(metrics_file, "eval"))
    trained = [record for record in read_metrics(metrics_file, "train") if record.get("loss") is not None]
    if not evaluations or evaluations[0]["step"] != 0 or len(evaluations) < 2 or not trained:
        steps = [record["step"] for record in evaluations]
        raise DataError(f"{metrics_file}: expected evaluations at step 0 and at the end, got them at {steps}")
    base, tuned = (
        Scores(record["step"], {source: _exact_match(record, source, metrics_file) for source in sources})
        for record in (evaluations[0], evaluations[-1])
    )
    return RunRecord(base, tuned, float(trained[-1]["loss"]), int(trained[-1]["num_steps"]))


def _exact_match(record: Mapping[str, Any], source: str, metrics_file: Path) -> float:
    value = record.get(f"{source}/exact_match")
    if value is None:
        raise DataError(f"{metrics_file}: no exact match of {source!r} at step {record['step']}, only {list(record)}")
    return float(value)


def load_and_score(base: Path, adapter: Path, heldout: DigitSplit) -> AdapterProof:
    """Load the adapter with PEFT and let it read all held-out pictures."""
    processor = Qwen2VLProcessor.from_pretrained(base)
    loaded = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype="auto")
    model = PeftModel.from_pretrained(loaded, str(adapter)).eval()
    lora = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    weights = adapter / ADAPTER_WEIGHTS
    answers = read_pictures(model, processor, heldout)
    correct = sum(answer == str(label) for answer, label in zip(answers, heldout.labels, strict=True))
    num_parameters = sum(parameter.numel() for parameter in lora)
    return AdapterProof(
        path=adapter,
        num_parameters=num_parameters,
        parameter_bytes=num_parameters * next(loaded.parameters()).element_size(),
        file_bytes=weights.stat().st_size,
        images_exact_match=correct / len(heldout.labels),
    )


@torch.inference_mode()
def read_pictures(model: Any, processor: Any, split: DigitSplit) -> list[str]:
    """Ask the model for each picture's digit."""
    content = [{"type": "text", "text": SYSTEM_PROMPT}, {"type": "image"}, {"type": "text", "text": IMAGE_QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    answers: list[str] = []
    for first in range(0, len(split.pictures), BATCH_SIZE):
        pictures = split.pictures[first : first + BATCH_SIZE]
        inputs = processor(
            text=[prompt] * len(pictures), images=pictures, padding=True, padding_side="left", return_tensors="pt"
        )
        generated = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)  # [B, T + new]
        new_tokens = generated[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
    return answers


def _interpreter() -> str:
    """This Python, short where it lies below the working directory: its environment need not be activated."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def format_table(record: RunRecord, proof: AdapterProof, base: Path, num_heldout: Mapping[str, int]) -> str:
    """The demo's last lines."""
    lines = [f"{'exact match':<12}{'base':>8}{'tuned':>8}{'held-out':>10}"]
    for source, count in num_heldout.items():
        before, after = record.base.exact_match[source], record.tuned.exact_match[source]
        lines.append(f"{source:<12}{before:>8.3f}{after:>8.3f}{count:>10}")
    ratio = proof.file_bytes / proof.parameter_bytes
    lines += [
        f"final loss  {record.final_loss:.4f} nats per answer token, after {record.num_steps} steps",
        f"adapter     {proof.path}: {proof.file_bytes:,} bytes; its {proof.num_parameters:,} trainable parameters are "
        f"{proof.parameter_bytes:,} bytes (x {ratio:.2f})",
        f"with PEFT   {proof.images_exact_match:.3f} of the held-out images, loaded without the trainer:",
        LOAD_COMMAND.format(python=_interpreter(), base=base, adapter=proof.path),
    ]
    return "\n".join(lines)
