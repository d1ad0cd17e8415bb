"""From the JSON, the training configuration and the model to the one dict that DeepSpeed is given, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlm_dist.errors import ConfigError

#: Larger buckets than this do not make a reduction faster; it is DeepSpeed's own default.
MAX_REDUCE_BUCKET_ELEMENTS = 500_000_000


@dataclass(frozen=True)
class DerivedValue:
    """A DeepSpeed value that nobody wrote, to be printed at the start."""

    key: str
    value: Any
    why: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value} ({self.why})"


def merge_deepspeed_config(
    content: Mapping[str, Any],
    *,
    per_device_train_batch_size: int,
    bf16: bool,
    fp16: bool,
    max_grad_norm: float,
    world_size: int,
    num_nodes: int = 1,
    num_trainable: int | None = None,
) -> tuple[dict[str, Any], list[DerivedValue]]:
    """Merge what DeepSpeed alone owns with what follows from the run.

    Args:
        content: from `load_deepspeed_json`.
        per_device_train_batch_size: samples per micro-batch.
        bf16: train in bfloat16, with float32 masters.
        fp16: train in float16, with float32 masters and a dynamic loss scale; with neither, in float32.
        max_grad_norm: gradients are clipped to this global norm; 0 = never.
        world_size: number of ranks.
        num_nodes: machines that they run on.
        num_trainable: trainable elements; None while the model is not loaded yet (see `zero_init_context`), then
            what follows from it is left out.

    Returns:
        The dict for DeepSpeed, and the values in it that were derived.

    Raises:
        ConfigError: values that do not fit together.
    """
    if bf16 and fp16:
        raise ConfigError("train_config.yaml: bf16 and fp16 are both true; choose one")
    merged = copy.deepcopy(dict(content))
    merged.update(
        # Accumulation is ours: DeepSpeed divides by its own count of micro-batches, we by the tokens of the step.
        train_micro_batch_size_per_gpu=per_device_train_batch_size,
        gradient_accumulation_steps=1,
        managed_gradient_accumulation=False,
        communication_data_type="fp32",
        data_types={"grad_accum_dtype": "fp32"},
        gradient_clipping=float(max_grad_norm),
        bf16={"enabled": bf16},
        fp16={"enabled": fp16},
        timers={"throughput": {"enabled": False}},  # on by default, and it synchronises the device at every step
        zero_force_ds_cpu_optimizer=False,
    )
    zero = merged["zero_optimization"]
    derived: list[DerivedValue] = []

    def derive(key: str, value: Any, why: str) -> None:
        if key not in zero:
            zero[key] = value
            derived.append(DerivedValue(f"zero_optimization.{key}", value, why))

    if num_trainable is not None and zero["stage"] > 0:
        bucket = max(1, min(num_trainable, MAX_REDUCE_BUCKET_ELEMENTS))
        derive("reduce_bucket_size", bucket, f"{num_trainable:,} trainable parameters; allocated up front")
    if zero["stage"] == 3:
        per_node, rest = divmod(world_size, num_nodes)
        if num_nodes > 1 and per_node > 1 and not rest:
            derive("zero_hpz_partition_size", per_node, "GPUs per node: frozen weights are gathered inside the node")
        hpz = zero.get("zero_hpz_partition_size", 1)
        if hpz > 1 and world_size % hpz:
            raise ConfigError(
                f"zero_optimization.zero_hpz_partition_size {hpz} does not divide the {world_size} ranks; "
                "set it to the number of GPUs per node, or remove it"
            )
    return merged, derived


def check_read_back(merged: Mapping[str, Any], effective: Any) -> None:
    """Compare what DeepSpeed was given with what it made of it.

    Args:
        merged: from `merge_deepspeed_config`.
        effective: the `DeepSpeedConfig` that the DeepSpeed engine holds.

    Raises:
        ConfigError: DeepSpeed changed or dropped a value.
    """
    found: dict[str, tuple[Any, Any]] = {}

    def compare(key: str, wanted: Any, got: Any) -> None:
        if wanted != got:
            found[key] = (wanted, got)

    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "managed_gradient_accumulation"):
        compare(key, merged[key], getattr(effective, key))
    compare("gradient_clipping", merged["gradient_clipping"], effective.gradient_clipping)
    compare("bf16.enabled", merged["bf16"]["enabled"], effective.bfloat16_config.enabled)
    compare("fp16.enabled", merged["fp16"]["enabled"], effective.float16_config.enabled)
    compare("data_types.grad_accum_dtype", "fp32", effective.grad_accum_dtype)
    compare("communication_data_type", "torch.float32", str(effective.communication_data_type))
    compare("timers.throughput.enabled", False, effective.timers_config.enabled)
    fields = type(effective.zero_config).model_fields
    names = {field.alias or name: name for name, field in fields.items()}
    for key, wanted in merged["zero_optimization"].items():
        got = getattr(effective.zero_config, names[key])
        if isinstance(wanted, Mapping):
            for inner, value in wanted.items():
                compare(f"zero_optimization.{key}.{inner}", value, getattr(got, inner))
        else:
            compare(f"zero_optimization.{key}", wanted, got)
    if found:
        raise ConfigError(
            "DeepSpeed did not take these values: "
            + "; ".join(f"{key}: wanted {wanted!r}, got {got!r}" for key, (wanted, got) in found.items())
        )
