"""`train_config.yaml`: how long, how fast, in which precision, and what is kept of it. Names are Hugging Face's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from vlm_dist.config.answer_metrics import ANSWER_METRICS, figure_of
from vlm_dist.config.section import (
    AS_TUPLE,
    Count,
    Interval,
    Name,
    Names,
    PathField,
    PositiveNumber,
    Section,
    expected,
)

Precision = Literal["bfloat16", "float16", "float32"]

_TRACKERS = frozenset({"wandb", "tensorboard"})
_OTHER_TRACKERS = frozenset({"mlflow", "comet_ml", "clearml", "neptune", "swanlab", "trackio", "dvclive", "all"})


#: A week; beyond it would hardly be a limit.
MAX_HANG_MINUTES = 7 * 24 * 60


def _read_trackers(value: Any) -> Any:
    """`wandb`, `tensorboard`, `none` or a list of them; `none` is the empty list."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise expected("wandb, tensorboard, none, or a list of them")
    for name in names:
        if name in _OTHER_TRACKERS:
            raise PydanticCustomError("not_yet_supported", "not yet supported; use wandb, tensorboard or none", {})
        if name not in _TRACKERS | {"none"}:
            raise expected("wandb, tensorboard, none, or a list of them")
    if "none" in names and len(names) > 1:
        raise expected("either none or names of trackers")
    return [name for name in dict.fromkeys(names) if name != "none"]


def _check_output_dir(value: Path) -> Path:
    """Neither a URL, which would become the folder `s3:`, nor the root of the file system."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(value)):
        raise PydanticCustomError("remote", "got a URL, expected a directory: output is written to files alone", {})
    if value == Path(value.anchor) and value.is_absolute():
        raise expected("a directory of the run's own")
    return value


def _read_resume(value: Any) -> Any:
    if value is False or (isinstance(value, str) and value.strip()):
        return value
    raise expected("auto, false, or the path of a checkpoint")


def _read_blocks(value: Any) -> Any:
    """`all`, `none`, a number of blocks, or `every-K`."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if value in ("all", "none") or (isinstance(value, str) and re.fullmatch(r"every-([2-9]|[1-9]\d+)", value)):
        return value
    raise expected("all, none, a number of blocks (the first so many), or every-2, every-3 and so on")


#: Blocks of a tower, such as those that are computed again in the backward.
Blocks = Annotated[int | str, BeforeValidator(_read_blocks)]


def _check_max_steps(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and value < 1 and value != -1:
        raise expected("a whole number of at least 1, or -1 for no limit")
    return value


class CheckpointingPolicy(Section):
    """Which blocks gradient checkpointing is for; the rest keep their activations."""

    language: Blocks = "all"
    vision: Blocks = "all"


def _read_metric(value: Any) -> Any:
    if isinstance(value, str) and figure_of(value) in ("loss", *ANSWER_METRICS) and not value.startswith("/"):
        return value
    raise expected(
        "eval_loss, eval_exact_match or another of eval_metrics (means over the held-out sources), or one source's, "
        "such as images/loss"
    )


#: By which a checkpoint can be the best.
BestMetric = Annotated[str, BeforeValidator(_read_metric)]


def _read_answer_metrics(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list | tuple) and names and all(name in ANSWER_METRICS for name in names):
        return list(dict.fromkeys(names))
    raise expected(f"a list of {', '.join(ANSWER_METRICS)}")


#: Of generated answers.
AnswerMetrics = Annotated[tuple[str, ...], AS_TUPLE, BeforeValidator(_read_answer_metrics)]


class ProfileSettings(Section):
    """Steps that are traced with torch's profiler."""

    start_step: Annotated[int, Field(ge=1)] = 10  # steps of this start of the run before them
    num_steps: Annotated[int, Field(ge=1, le=100)] = 3  # a trace of many steps is too large to be looked at
    ranks: Annotated[tuple[Annotated[int, Field(ge=0)], ...], AS_TUPLE, Field(min_length=1)] = (0,)
    memory: bool = False


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
    nonfinite_steps: Literal["skip", "fail"] = "skip"  # what a gradient that is not finite does
    max_nonfinite_steps: Count = 10  # so many in a row end the run, skipped or not
    seed: Annotated[int, Field(ge=0)] = 42

    logging_steps: Interval = 0.1
    eval_steps: Interval = 0.1
    save_steps: Interval = 0.1
    save_total_limit: Count | None = 2  # null: keep all
    save_keep_steps: Interval = 0  # one every so many steps stays for ever, beyond the limit
    metric_for_best_model: BestMetric | None = None  # eval_loss, one of eval_metrics, or <source>/<figure>; it stays
    greater_is_better: bool | None = None  # null: it is known of each metric
    save_in_slices: Literal["auto"] | bool = "auto"  # each rank writes its own share: auto: where the state is large
    early_stopping_patience: Count | None = None  # evaluations without improvement that end the run; null: never
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0  # an improvement is more than this
    load_best_model_at_end: bool = False  # output_dir/adapter is that of the best checkpoint, not of the last step
    eval_on_start: bool = False
    predict_with_generate: bool = False
    generation_max_new_tokens: Count = 32
    eval_metrics: AnswerMetrics = ("exact_match",)  # of generated answers

    output_dir: Annotated[PathField, AfterValidator(_check_output_dir)] = Path("runs/default")
    resume: Annotated[Literal[False] | str, BeforeValidator(_read_resume)] = False
    resume_anyway: Annotated[tuple[Literal["data", "model"], ...], AS_TUPLE] = ()  # what may have changed on resume
    stop_at_step: Annotated[Interval, Field(gt=0)] | None = None

    gradient_checkpointing: bool = True
    gradient_checkpointing_policy: CheckpointingPolicy = Field(default_factory=CheckpointingPolicy)
    torch_compile: bool = False  # the repeated blocks, each by itself
    torch_compile_backend: Literal["inductor", "aot_eager", "eager"] = "inductor"  # the others generate no code
    memory_check: Literal["auto", True, False] = "auto"  # auto: on GPUs
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

    report_to: Annotated[tuple[Literal["wandb", "tensorboard"], ...], AS_TUPLE, BeforeValidator(_read_trackers)] = (
        "wandb",
    )
    run_name: Name | None = None
    wandb_project: Name = "vlm-dist"
    wandb_entity: Name | None = None  # team or user; null: the account's default
    wandb_group: Name | None = None
    wandb_tags: Names = ()
    wandb_notes: Name | None = None
    wandb_artifacts: Literal["none", "final", "best", "all"] = "none"  # adapters that wandb keeps
    device_peak_tflops: PositiveNumber | None = None  # what MFU is a share of; null: by the GPU's name
    profile: ProfileSettings | None = None
    hang_timeout_minutes: Annotated[PositiveNumber, Field(le=MAX_HANG_MINUTES)] = (
        20  # no phase of a step may take longer: the ranks end, with stacks
    )
    gc_steps: Annotated[int, Field(ge=0)] = 50  # steps between two garbage collections of Python; 0: as it likes
    debug_collectives: bool = False  # the ranks compare every collective before they enter it
    sample_ledger: bool = False  # output_dir/ledger: the samples of each applied step

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
        "gradient_checkpointing_ratio": "use gradient_checkpointing_policy: language: N, or every-2",
        "activation_checkpointing": "use gradient_checkpointing",
        "use_liger_kernel": "its kernels patch model classes by exact name and need Triton on a GPU, where their "
        "gradients have not been compared with ours yet; logits are never whole without it (docs/memory.md)",
        "sequence_parallel_size": "DeepSpeed's Ulysses attention takes text alone: it cuts every tensor of a batch "
        "along the tokens, and takes the vision tower's attention for the language model's (docs/memory.md); "
        "shorten clips with num_frames, or pack",
        "torch_compile_mode": "blocks are compiled in the default mode, with lengths that may change",
    }

    @property
    def precision(self) -> Precision:
        """The type that the frozen base computes in."""
        if self.bf16:
            return "bfloat16"
        return "float16" if self.fp16 else "float32"
