"""Hugging Face's Trainer with PEFT and DeepSpeed: pictures are processed in the collator, as its documents do."""

from __future__ import annotations

from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from tests.bench.training.job import TARGET_PATTERN, Job
from tests.bench.training.trainers.hugging_face_clock import common_arguments, watch
from vlm_dist.model.patch_embedding import use_matrix_products

#: Settings -> what they add.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "batch_rebalance": {"train_sampling_strategy": "batch_rebalance"},
    "our patch embedding": {},
    "streaming": {"accelerator_config": {"dispatch_batches": False, "split_batches": False}},
}


class Collator:
    """Rows to one padded batch; loss on the answers alone."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        texts, images = [], []
        for row in rows:
            content = [{"type": "text", "text": row["question"]}]
            if row["image"]:
                content.insert(0, {"type": "image"})
                images.append(Image.open(row["image"]).convert("RGB"))
            answer = [{"type": "text", "text": row["answer"]}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            texts.append(self.processor.apply_chat_template(messages))
        batch = self.processor(text=texts, images=images or None, padding=True, return_tensors="pt")
        labels = torch.full_like(batch["input_ids"], -100)
        ends = batch["attention_mask"].sum(1).tolist()
        for i, row in enumerate(rows):
            count = len(self.processor.tokenizer(row["answer"] + "<|im_end|>\n")["input_ids"])
            labels[i, ends[i] - count : ends[i]] = batch["input_ids"][i, ends[i] - count : ends[i]]
        return {**batch, "labels": labels}


def main() -> None:
    """Train as the job says."""
    job = Job.read()
    processor = AutoProcessor.from_pretrained(job.model)
    clock = watch(job, processor.tokenizer.pad_token_id)
    clock.write("imported")
    arguments = TrainingArguments(
        **common_arguments(job),
        **SETTINGS[job.settings],
        remove_unused_columns=False,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    model = AutoModelForImageTextToText.from_pretrained(job.model, dtype=torch.float32)
    if job.settings == "our patch embedding":
        use_matrix_products(model)
    config = LoraConfig(r=job.rank, lora_alpha=job.alpha, lora_dropout=0.0, target_modules=TARGET_PATTERN)
    samples = job.samples_file(lambda row: {**row, "length": row["tokens"]})
    trainer = Trainer(
        model=get_peft_model(model, config),
        args=arguments,
        data_collator=Collator(processor),
        train_dataset=load_dataset(
            "json", data_files=str(samples), split="train", streaming=job.settings == "streaming"
        ),
    )
    trainer.train(resume_from_checkpoint=job.checkpoint())
    clock.write("done")


if __name__ == "__main__":
    main()
