"""LLaMA-Factory, by the function behind `llamafactory-cli train`: ShareGPT rows, its own processing and collator."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from llamafactory.train.tuner import run_exp
from transformers import AutoTokenizer

from tests.bench.training.job import TARGETS, Job
from tests.bench.training.trainers.hugging_face_clock import common_arguments, watch

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "batch_rebalance": {"train_sampling_strategy": "batch_rebalance"},
    "neat_packing": {"neat_packing": True, "packing": True},
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
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    described = {"file_name": f"../{samples.name}", "formatting": "sharegpt", "columns": columns, "tags": tags}
    folder = samples.parent / f"described-{clock.rank}"
    folder.mkdir(exist_ok=True)
    (folder / "dataset_info.json").write_text(json.dumps({"rows": described}))
    packs = "packing" in SETTINGS[job.settings]
    run_exp(
        {
            # a pack is a row: one is as many samples as a micro-batch of the others
            **common_arguments(replace(job, per_device=1) if packs else job),
            **SETTINGS[job.settings],
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": job.model,
            "finetuning_type": "lora",
            "lora_rank": job.rank,
            "lora_alpha": job.alpha,
            "lora_target": ",".join(TARGETS),
            "dataset_dir": str(folder),
            "dataset": "rows",
            "template": "qwen2_vl",
            "cutoff_len": job.pack_tokens() if packs else job.max_length,
            "resume_from_checkpoint": job.checkpoint(),
            "preprocessing_num_workers": 2,
            "image_max_pixels": 1 << 24,
        }
    )
    clock.write("done")


if __name__ == "__main__":
    main()
