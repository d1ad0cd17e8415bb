"""ms-swift, by the function behind `swift sft`: rows of messages and pictures, its own template and collator."""

from __future__ import annotations

from typing import Any

from swift import SftArguments, sft_main
from transformers import AutoTokenizer

from tests.bench.training.job import Job
from tests.bench.training.trainers.hugging_face_clock import common_arguments, watch

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "group_by_length": {"group_by_length": True},
    "packing": {"packing": True},
}


def main() -> None:
    """Train as the job says."""
    job = Job.read()
    clock = watch(job, AutoTokenizer.from_pretrained(job.model).pad_token_id)
    clock.write("imported")
    samples = job.samples_file(
        lambda row: {
            "messages": [
                {"role": "user", "content": ("<image>" if row["image"] else "") + row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ],
            "images": [row["image"]] if row["image"] else [],
        }
    )
    sft_main(
        SftArguments(
            **common_arguments(job),
            **SETTINGS[job.settings],
            model=job.model,
            model_type="qwen2_vl",
            template="qwen2_vl",
            dataset=[str(samples)],
            split_dataset_ratio=0.0,
            tuner_type="lora",
            lora_rank=job.rank,
            lora_alpha=job.alpha,
            lora_dropout=0.0,
            torch_dtype="float32",
            fp16=False,
            attn_impl="sdpa",
            max_length=job.max_length,
            resume_from_checkpoint=job.checkpoint(),
        )
    )
    clock.write("done")


if __name__ == "__main__":
    main()
