"""vlm-dist, by its own command: the run file of the job, then `vlm_dist.train`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.bench.training.job import TARGETS, Clock, Job

ROOT = Path(__file__).resolve().parents[4]
SETTINGS: dict[str, dict[str, Any]] = {
    "packing": {"packing": True},
    "group_by_length": {"group_by_length": True},
    "padding": {"group_by_length": False},
}


def run_file(job: Job) -> Path:
    """Write the run file and DeepSpeed's."""
    folder = Path(job.output)
    stage = {"zero_optimization": {"stage": job.zero}}
    (folder / "zero.json").write_text(json.dumps(stage))
    has_images = any(row["image"] for row in job.rows())
    question = [*([{"type": "image"}] if has_images else []), {"type": "text", "text": "{question_column}"}]
    source = {"name": "rows", "type": "tar", "path": f"{job.data}/tar"} | (
        {"columns": {"image": "jpg"}} if has_images else {}
    )
    if not Path(job.data, "tar").is_dir():  # read in place, as the peers do
        source = {"name": "rows", "type": "jsonl", "path": f"{job.data}/rows.jsonl", "media_root": job.data}
    media = {"image_column": "image"} if has_images else {}
    answer = [{"type": "text", "text": "{answer_column}"}]
    run = {
        "model": job.model,
        "configs": {key: str(ROOT / "configs" / f"{name}.yaml") for key, name in _FILES.items()},
        "deepspeed": str(folder / "zero.json"),
        "overrides": {
            "model": {"loading_params": {"device_map": None, "torch_dtype": "float32"}},
            "collator": {
                "dataset_columns": {**media, "question_column": "question", "answer_column": "answer"},
                "data_processing": {"image_data": has_images, "video_data": False},
                "message_format": {
                    "training_messages": [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": answer},
                    ]
                },
                "image_processing": {"max_size": 4096},
                "text_processing": {"max_length": job.max_length},
                "label_masking": {"mask_input_tokens": True},
            },
            "train": {
                "output_dir": str(folder / "run"),
                "report_to": "none",
                "per_device_train_batch_size": job.per_device,
                "gradient_accumulation_steps": job.accumulation,
                "max_steps": max(job.num_steps, job.pretended + job.num_steps),
                "stop_at_step": job.num_steps if job.pretended else None,
                "resume": "auto" if job.resumed_at else False,
                "num_train_epochs": 1000,
                "learning_rate": job.learning_rate,
                "lr_scheduler_type": "constant",
                "bf16": False,
                "seed": job.seed,
                "logging_steps": 10,
                "eval_steps": 0,
                "save_steps": 0 if job.pretended else job.save_at,
                "dataloader_num_workers": job.workers,
                **SETTINGS[job.settings],
            },
            "peft": {
                "r": job.rank,
                "lora_alpha": job.alpha,
                "lora_dropout": 0.0,
                "target_modules": list(TARGETS),
                "towers": {"vision": "freeze", "projector": "freeze", "language": "lora"},
            },
            "data": {
                "index_dir": str(folder / "index"),
                "train": [source],
                "eval": [],
            },
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path


_FILES = {
    "model": "vlm_model_config",
    "collator": "vlm_collator_config",
    "train": "train_config",
    "peft": "peft_config",
    "data": "data_config",
}


def main() -> None:
    """Train as the job says."""
    job = Job.read(next(argument for argument in sys.argv[1:] if not argument.startswith("-")))
    # all that a run imports later, so that imports are told apart from what a run does
    import vlm_dist.build  # noqa: F401
    from vlm_dist.checkpoint.saver import CheckpointSaver
    from vlm_dist.meter import Meter
    from vlm_dist.train import main as train
    from vlm_dist.trainer import Trainer

    clock = Clock(job)
    clock.write("imported")
    own_add, own_run, own_begin, own_save = Meter.add, Trainer.run, CheckpointSaver.begin, Trainer._save

    def add(self: Any, tally: Any, fetched: Any, *args: Any, **kwargs: Any) -> None:
        own_add(self, tally, fetched, *args, **kwargs)
        clock.count(sum(batch.num_tokens for batch in fetched.micro_batches))
        losses = [float(loss) for loss in tally.losses]
        targets = sum(batch.num_target_tokens for batch in fetched.micro_batches)
        clock.step(fetched.plan.step + 1, loss=sum(losses) / max(targets, 1))

    def run(self: Any) -> Any:
        clock.write("train", step=self.position)
        return own_run(self)

    def begin(self: Any, position: int) -> None:
        own_begin(self, position)
        clock.write("saved", step=position)

    def save(self: Any) -> None:
        self.position = job.pretended or self.position
        own_save(self)

    Meter.add, Trainer.run, CheckpointSaver.begin = add, run, begin  # type: ignore[method-assign]
    Trainer._save = save  # type: ignore[method-assign]
    code = train(["--config", str(Path(job.output) / "run.yaml")])
    clock.write("done")
    sys.exit(code)


if __name__ == "__main__":
    main()
