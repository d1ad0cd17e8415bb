"""The clock in whatever is built on Hugging Face's Trainer: its steps, its saves, the real tokens of its inputs."""

from __future__ import annotations

from typing import Any

from tests.bench.training.job import Clock, Job


def watch(job: Job, pad_token_id: int) -> Clock:
    """Have every Trainer of this process write its steps.

    Args:
        job: of this process.
        pad_token_id: of the tokenizer; everything else in `input_ids` is real.
    """
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import CallbackHandler

    clock = Clock(job)
    own_step = Trainer.training_step
    own_handler = CallbackHandler.__init__
    losses: list[float] = []

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        clock.count(int((inputs["input_ids"] != pad_token_id).sum()))
        loss = own_step(self, model, inputs, *args, **kwargs)
        losses.append(float(loss))
        return loss

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.write("train", step=state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.step(state.global_step, loss=sum(losses))
            losses.clear()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.write("saved", step=state.global_step)

    def handler(self: Any, callbacks: Any, *args: Any, **kwargs: Any) -> None:
        own_handler(self, [*callbacks, Watch()], *args, **kwargs)

    Trainer.training_step = training_step
    CallbackHandler.__init__ = handler
    return clock


def common_arguments(job: Job) -> dict[str, Any]:
    """Of `TrainingArguments`: what has to be equal for all trainers."""
    return {
        "output_dir": f"{job.output}/run",
        "max_steps": job.num_steps,
        "per_device_train_batch_size": job.per_device,
        "gradient_accumulation_steps": job.accumulation,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": True,
        "bf16": False,
        "use_cpu": True,
        "seed": job.seed,
        "report_to": "none",
        "deepspeed": job.deepspeed,
        "save_strategy": "steps" if job.save_at else "no",
        "save_steps": job.save_at or 500,
        "dataloader_num_workers": job.workers,
    }
