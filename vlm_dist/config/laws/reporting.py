"""Where figures go: keys that need each other."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_dist.config.laws.finding import Finding
from vlm_dist.config.train import TrainConfig
from vlm_dist.config.yaml_document import KeyPath

_OF_WANDB = ("wandb_entity", "wandb_group", "wandb_tags", "wandb_notes")


def check_reporting(train: TrainConfig) -> Iterator[Finding]:
    """What is for wandb needs wandb, and the best adapter a metric that it is the best by."""
    report_to: KeyPath = ("train", "report_to")
    artifacts: KeyPath = ("train", "wandb_artifacts")
    if "wandb" not in train.report_to:
        set_keys = [key for key in _OF_WANDB if getattr(train, key)]
        if train.wandb_artifacts != "none":
            set_keys.append("wandb_artifacts")
        for key in set_keys:
            yield Finding(
                ("train", key), "has no effect: report_to does not name wandb", also=(report_to,), is_notice=True
            )
        return
    if train.wandb_artifacts == "best" and train.metric_for_best_model is None:
        message = "best needs metric_for_best_model, which says by what a checkpoint is the best"
        yield Finding(artifacts, message, also=(("train", "metric_for_best_model"),))
    if train.wandb_artifacts in ("best", "all") and train.save_steps == 0:
        message = (
            f"{train.wandb_artifacts} keeps adapters of checkpoints, and save_steps is 0: there is only the last one"
        )
        yield Finding(artifacts, message, also=(("train", "save_steps"),), is_notice=True)
