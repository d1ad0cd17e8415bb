"""Laws of training: batches, evaluation, the best checkpoint, packing, workers."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from vlm_dist.config.answer_metrics import figure_of
from vlm_dist.config.data import DataConfig
from vlm_dist.config.laws.finding import Finding
from vlm_dist.config.train import TrainConfig
from vlm_dist.config.vlm_collator import VlmCollatorConfig
from vlm_dist.config.yaml_document import KeyPath


def check_training(train: TrainConfig, data: DataConfig) -> Iterator[Finding]:
    """Evaluation and checkpointing have what they need."""
    if not train.gradient_checkpointing and "gradient_checkpointing_policy" in train.model_fields_set:
        policy = train.gradient_checkpointing_policy
        if (policy.language, policy.vision) != ("all", "all"):
            yield Finding(
                ("train", "gradient_checkpointing_policy"),
                "has no effect: gradient_checkpointing is false",
                also=(("train", "gradient_checkpointing"),),
                is_notice=True,
            )
    if train.warmup_steps and "warmup_ratio" in train.model_fields_set and train.warmup_ratio:
        message = f"has no effect: warmup_steps {train.warmup_steps} wins"
        yield Finding(("train", "warmup_ratio"), message, also=(("train", "warmup_steps"),), is_notice=True)
    if train.warmup_steps and train.lr_scheduler_type == "constant":
        message = "has no effect: lr_scheduler_type constant has no warm-up; constant_with_warmup has"
        yield Finding(("train", "warmup_steps"), message, also=(("train", "lr_scheduler_type"),), is_notice=True)
    if data.eval:
        if train.predict_with_generate and not (train.eval_steps or train.eval_on_start):
            message = "has no effect: eval_steps is 0 and eval_on_start is false, so no evaluation is ever due"
            also: tuple[KeyPath, ...] = (("train", "eval_steps"), ("train", "eval_on_start"))
            yield Finding(("train", "predict_with_generate"), message, also=also, is_notice=True)
        return
    if train.predict_with_generate:
        message = "got true, but data.eval is empty: name held-out samples"
        yield Finding(("train", "predict_with_generate"), message, also=(("data", "eval"),))
    elif train.eval_steps or train.eval_on_start:
        message = "no held-out samples: no evaluation"
        yield Finding(("data", "eval"), message, also=(("train", "eval_steps"),), is_notice=True)


def check_best(train: TrainConfig, data: DataConfig) -> Iterator[Finding]:
    """What it takes to know the best checkpoint."""
    metric: KeyPath = ("train", "metric_for_best_model")
    better: KeyPath = ("train", "greater_is_better")
    if train.metric_for_best_model is None:
        if train.greater_is_better is not None:
            yield Finding(better, "has no effect: metric_for_best_model is null", also=(metric,), is_notice=True)
        return
    name = train.metric_for_best_model
    if not data.eval or not train.eval_steps:
        reason = "data.eval is empty: name held-out samples" if not data.eval else "eval_steps is 0"
        yield Finding(metric, f"got {name}, but {reason}", also=(("data", "eval"), ("train", "eval_steps")))
    elif figure_of(name) != "loss" and not train.predict_with_generate:
        message = f"got {name}, which needs predict_with_generate: true"
        yield Finding(metric, message, also=(("train", "predict_with_generate"),))
    elif figure_of(name) not in ("loss", *train.eval_metrics):
        message = f"got {name}, but eval_metrics has only {', '.join(train.eval_metrics)}: add {figure_of(name)}"
        yield Finding(metric, message, also=(("train", "eval_metrics"),))
    save, evaluate = train.save_steps, train.eval_steps
    if save and evaluate and (save < 1) == (evaluate < 1) and (Fraction(str(save)) % Fraction(str(evaluate))):
        message = (
            f"only checkpoints of steps that are evaluated can be the best, and save_steps {save:g} is no multiple of "
            f"eval_steps {evaluate:g}"
        )
        yield Finding(metric, message, also=(("train", "save_steps"), ("train", "eval_steps")), is_notice=True)


def check_early_end(train: TrainConfig) -> Iterator[Finding]:
    """What goes by the best evaluation knows which it is."""
    metric: KeyPath = ("train", "metric_for_best_model")
    patience: KeyPath = ("train", "early_stopping_patience")
    if train.metric_for_best_model is None:
        for key, is_on in (
            ("early_stopping_patience", train.early_stopping_patience is not None),
            ("load_best_model_at_end", train.load_best_model_at_end),
        ):
            if is_on:
                message = f"got {getattr(train, key)}, which needs metric_for_best_model: by what one is better".lower()
                yield Finding(("train", key), message, also=(metric,))
    elif train.load_best_model_at_end and not train.save_steps:
        message = "got true, but save_steps is 0: no checkpoint before the last could be the best"
        yield Finding(("train", "load_best_model_at_end"), message, also=(("train", "save_steps"),))
    if train.early_stopping_threshold and train.early_stopping_patience is None:
        threshold: KeyPath = ("train", "early_stopping_threshold")
        yield Finding(threshold, "has no effect: early_stopping_patience is null", also=(patience,), is_notice=True)
    if train.eval_metrics != TrainConfig.model_fields["eval_metrics"].default and not train.predict_with_generate:
        generates: KeyPath = ("train", "predict_with_generate")
        message = "has no effect in training: predict_with_generate is false"
        yield Finding(("train", "eval_metrics"), message, also=(generates,), is_notice=True)


def check_packing(train: TrainConfig, collator: VlmCollatorConfig) -> Iterator[Finding]:
    """Packs have limits that samples fit in."""
    packing: KeyPath = ("train", "packing")
    tokens_path: KeyPath = ("train", "pack_max_tokens")
    if not train.packing:
        for key in ("pack_max_tokens", "pack_max_patches"):
            if getattr(train, key) is not None:
                yield Finding(("train", key), "has no effect: packing is false", also=(packing,), is_notice=True)
        return
    if train.group_by_length:
        message = "has no effect: packing wins, as it pads nothing"
        yield Finding(("train", "group_by_length"), message, also=(packing,), is_notice=True)
    longest = collator.text_processing.max_length
    if train.pack_max_tokens is not None and train.pack_max_tokens < longest:
        message = (
            f"{train.pack_max_tokens} is less than text_processing.max_length {longest}: a sample that is longer has a "
            "pack of its own, as long as it is"
        )
        also: tuple[KeyPath, ...] = (packing, ("collator", "text_processing", "max_length"))
        yield Finding(tokens_path, message, also=also, is_notice=True)


def check_lengths(train: TrainConfig, data: DataConfig) -> Iterator[Finding]:
    """Lengths are asked for where they are counted."""
    if data.lengths != "auto" and not (train.group_by_length or train.packing):
        message = f"{data.lengths} has no effect: neither group_by_length nor packing asks for lengths"
        also: tuple[KeyPath, ...] = (("train", "group_by_length"), ("train", "packing"))
        yield Finding(("data", "lengths"), message, also=also, is_notice=True)


def check_workers(train: TrainConfig, data: DataConfig, collator: VlmCollatorConfig) -> Iterator[Finding]:
    """What worker processes are for, where there are none."""
    if train.dataloader_num_workers:
        return
    workers: KeyPath = ("train", "dataloader_num_workers")
    if train.dataloader_prefetch_factor != TrainConfig.model_fields["dataloader_prefetch_factor"].default:
        message = "has no effect: with dataloader_num_workers 0 every step is prepared when it is needed"
        yield Finding(("train", "dataloader_prefetch_factor"), message, also=(workers,), is_notice=True)
    for key in ("sample_timeout_seconds", "worker_memory_gib"):
        if getattr(data, key) != DataConfig.model_fields[key].default:
            message = "has no effect: train.dataloader_num_workers is 0, so that samples are decoded in this process"
            yield Finding(("data", key), message, also=(workers,), is_notice=True)
    if collator.data_processing.video_data:
        message = "0 decodes videos in the training process, which a damaged one can end or hang; 1 outlives that"
        also = (("collator", "data_processing", "video_data"),)
        yield Finding(workers, message, also=also, is_notice=True)
