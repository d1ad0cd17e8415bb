"""What a run takes over from its checkpoint, what it leaves in one, and what it refuses to continue."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import yaml

from vlm_dist import __version__
from vlm_dist.checkpoint import Checkpoint, CheckpointStore, RunFacts
from vlm_dist.checkpoint.layout import RESOLVED_CONFIG
from vlm_dist.config import RunConfig
from vlm_dist.config.arithmetic import BatchArithmetic, resolve_batch
from vlm_dist.config.masking import without_secrets
from vlm_dist.data.plan.plan import Plan
from vlm_dist.distributed.failures import agree_on_failure
from vlm_dist.distributed.group import Ranks
from vlm_dist.engine import Engine
from vlm_dist.errors import CheckpointError, ConfigError


def fit_batch(config: RunConfig, ranks: Ranks, checkpoint: Checkpoint | None) -> BatchArithmetic:
    """The global batch belongs to the run: on resume the checkpoint's wins, and accumulation follows."""
    saved = checkpoint.info["global_batch_size"] if checkpoint is not None else None
    return resolve_batch(config.train, ranks.world_size, saved, allow_idle=True)


def prepare_output_dir(config: RunConfig, store: CheckpointStore, ranks: Ranks) -> None:
    """Refuse to mix two runs in one directory, or one that cannot be written. Collective: every rank calls this."""
    output_dir = config.train.output_dir
    with agree_on_failure(ranks):
        if ranks.is_main:
            if config.train.resume is False and store.latest() is not None:
                raise CheckpointError(
                    f"{output_dir} has checkpoints of an earlier run, and resume is false; set train.resume=auto to "
                    "continue it, or another train.output_dir"
                )
            try:
                output_dir.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=output_dir):
                    pass
            except OSError as error:
                raise ConfigError(
                    f"train.output_dir: cannot write to {output_dir}: {error.strerror}; "
                    "name a directory that can be written"
                ) from error


def check_end(checkpoint: Checkpoint, plan: Plan) -> None:
    """Refuse a run that ends before its checkpoint: its adapter would not be what the configuration says."""
    if checkpoint.step > plan.num_steps:
        raise CheckpointError(
            f"{checkpoint.path} has done {checkpoint.step} steps, but the run has {plan.num_steps}; raise "
            "train.max_steps or train.num_train_epochs, or resume from an earlier checkpoint"
        )


def run_facts(
    config: RunConfig, batch: BatchArithmetic, engine: Engine, ranks: Ranks
) -> Callable[[dict[str, Any]], RunFacts]:
    """What a checkpoint says besides tensors, given the plan's state."""
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "deepspeed")}
    resolved = config.to_yaml()
    return lambda plan_state: RunFacts(
        plan=plan_state,
        global_batch_size=batch.global_batch_size,
        resolved_config=resolved,
        scheduler=_schedule_facts(config),
        versions={"vlm-dist": __version__, **versions, "python": platform.python_version()},
        topology={"world_size": ranks.world_size, "zero_stage": engine.zero_stage},
    )


def _schedule_facts(config: RunConfig) -> dict[str, Any]:
    """What the schedule of the learning rate is made from."""
    keys = (
        "lr_scheduler_type",
        "learning_rate",
        "warmup_ratio",
        "warmup_steps",
        "num_train_epochs",
        "max_steps",
    )
    return {key: getattr(config.train, key) for key in keys}


#: What makes the adapter another one: a checkpoint of other values is not continued.
FIXED = (
    "model_id",
    *(f"peft.{key}" for key in ("r", "lora_alpha", "target_modules", "bias", "use_rslora", "use_dora")),
    *(f"peft.{key}" for key in ("modules_to_save", "quantization", "towers")),
)
#: What says where and how far to run, and changes nothing of what is learned.
FREE = (
    *("deepspeed", "train.output_dir", "train.resume", "train.stop_at_step", "train.run_name", "data.index_dir"),
    "peft.adapter",  # says where the run began
)


def check_config(config: RunConfig, checkpoint: Checkpoint) -> list[str]:
    """Compare the run's configuration with the checkpoint's.

    Returns:
        One notice per value that differs and may.

    Raises:
        CheckpointError: the base model or the adapter is another one; lists all differences of them.
    """
    written = yaml.safe_load((checkpoint.path / RESOLVED_CONFIG).read_text(encoding="utf-8")) or {}
    saved = _flat(without_secrets(written))  # a signature that was made anew is no difference
    now = _flat(yaml.safe_load(config.to_yaml()))
    differing = [key for key in sorted(saved.keys() & now.keys()) if saved[key] != now[key]]
    lines = {key: f"{key}: {saved[key]!r} in the checkpoint, now {now[key]!r}" for key in differing}
    fixed = [lines[key] for key in differing if _is_within(key, FIXED)]
    if fixed:
        raise CheckpointError(
            f"{checkpoint.path} is of another model or adapter:\n  "
            + "\n  ".join(fixed)
            + "\nrestore the values of the checkpoint, or start a new run in another train.output_dir"
        )
    return [lines[key] for key in differing if not _is_within(key, FREE)]


def _is_within(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
