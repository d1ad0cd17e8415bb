"""TRL's SFTTrainer, with its own collator for vision-language data: prompt and completion, loss on the completion."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Image, Sequence, load_dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from tests.bench.training.job import TARGET_PATTERN, Job
from tests.bench.training.trainers.hugging_face_clock import common_arguments, watch

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    # the column of lengths is not among those that it knows, and would be removed
    "group_by_length": {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False},
    "batch_rebalance": {"train_sampling_strategy": "batch_rebalance", "remove_unused_columns": False},
}


def main() -> None:
    """Train as the job says."""
    job = Job.read()
    processor = AutoProcessor.from_pretrained(job.model)
    clock = watch(job, processor.tokenizer.pad_token_id)
    clock.write("imported")
    samples = job.samples_file(
        lambda row: {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
            "images": [row["image"]] if row["image"] else [],
            "length": row["tokens"],
        }
    )
    dataset = load_dataset("json", data_files=str(samples), split="train").cast_column("images", Sequence(Image()))
    trainer = SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(job.model, dtype=torch.float32),
        args=SFTConfig(**common_arguments(job), **SETTINGS[job.settings], max_length=None),
        train_dataset=dataset,
        processing_class=processor,
        peft_config=LoraConfig(
            r=job.rank, lora_alpha=job.alpha, lora_dropout=0.0, target_modules=TARGET_PATTERN, task_type="CAUSAL_LM"
        ),
    )
    trainer.train(resume_from_checkpoint=job.checkpoint())
    clock.write("done")


if __name__ == "__main__":
    main()
