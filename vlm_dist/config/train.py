"""`train_config.yaml`: how long, how fast, in which precision, and what is kept of it. Names are Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from vlm_dist.config.section import (
    AS_TUPLE,
    Count,
    Interval,
    Name,
    PathField,
    PositiveNumber,
    Section,
    expected,
)

Precision = Literal["bfloat16", "float16", "float32"]

_OTHER_TRACKERS = frozenset(
    {"tensorboard", "mlflow", "comet_ml", "clearml", "neptune", "swanlab", "trackio", "dvclive", "all"}
)


def _read_trackers(value: Any) -> Any:
    """`wandb`, `none` or a list of them; `none` is the empty list."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise expected("wandb, none, or a list of them")
    for name in names:
        if name in _OTHER_TRACKERS:
            raise PydanticCustomError("not_yet_supported", "not yet supported; use wandb or none", {})
        if name not in {"wandb", "none"}:
            raise expected("wandb, none, or a list of them")
    if "none" in names and len(names) > 1:
        raise expected("either none or names of trackers")
    return [name for name in names if name != "none"]


def _read_resume(value: Any) -> Any:
    if value is False or (isinstance(value, str) and value.strip()):
        return value
    raise expected("auto, false, or the path of a checkpoint")


def _check_max_steps(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and value < 1 and value != -1:
        raise expected("a whole number of at least 1, or -1 for no limit")
    return value


class TrainConfig(Section):
    """Batch sizes are per device; intervals are steps, or shares of all steps below 1; 0 is never."""

    per_device_train_batch_size: Count = 8
    per_device_eval_batch_size: Count = 8
    gradient_accumulation_steps: Count = 2

    learning_rate: PositiveNumber = 1e-5
    num_train_epochs: PositiveNumber = 1.0
    max_steps: Annotated[int, BeforeValidator(_check_max_steps)] = -1  # -1: num_train_epochs decides
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # above 0 it wins over warmup_ratio
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: PositiveNumber = 1e-8
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # 0: no clipping
    seed: Annotated[int, Field(ge=0)] = 42

    logging_steps: Interval = 0.1
    eval_steps: Interval = 0.1
    save_steps: Interval = 0.1
    save_total_limit: Count | None = 2  # null: keep all
    eval_on_start: bool = False
    predict_with_generate: bool = False
    generation_max_new_tokens: Count = 32

    output_dir: PathField = Path("runs/default")
    resume: Annotated[Literal[False] | str, BeforeValidator(_read_resume)] = False
    stop_at_step: Annotated[Interval, Field(gt=0)] | None = None

    gradient_checkpointing: bool = True
    bf16: bool = True
    fp16: bool = False

    group_by_length: bool = True
    packing: bool = False  # wins over group_by_length
    pack_max_tokens: Count | None = None  # null: per_device_train_batch_size x text_processing.max_length
    pack_max_patches: Count | None = None  # of the vision tower; null: no limit
    balance_scope: Literal["world", "node"] = "world"
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = False
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 2
    dataloader_prefetch_factor: Count = 2  # whole steps that are prepared ahead

    report_to: Annotated[tuple[Literal["wandb"], ...], AS_TUPLE, BeforeValidator(_read_trackers)] = ("wandb",)
    run_name: Name | None = None
    wandb_project: Name = "vlm-dist"

    foreign_keys: ClassVar[dict[str, str]] = {
        "deepspeed": "the run file names the DeepSpeed JSON (deepspeed: …)",
        "eval_strategy": "eval_steps alone decides; 0 is never",
        "evaluation_strategy": "eval_steps alone decides; 0 is never",
        "save_strategy": "save_steps alone decides; 0 is never",
        "logging_strategy": "logging_steps alone decides; 0 is never",
        "optim": "AdamW is the only optimizer so far",
        "resume_from_checkpoint": "use resume: auto, false, or the path of a checkpoint",
        "global_batch_size": "it follows from per_device_train_batch_size x gradient_accumulation_steps x ranks",
        "length_grouped": "use group_by_length",
        "train_sampling_strategy": "use group_by_length",
        "gradient_checkpointing_kwargs": "checkpointing is always non-reentrant",
    }

    @property
    def precision(self) -> Precision:
        """The type that the frozen base computes in."""
        if self.bf16:
            return "bfloat16"
        return "float16" if self.fp16 else "float32"
