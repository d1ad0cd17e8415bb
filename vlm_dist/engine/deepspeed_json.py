"""A DeepSpeed JSON file, read strictly: DeepSpeed itself drops misspelled keys and "auto" without a word.

The file holds only what DeepSpeed alone owns. A value that `train_config.yaml` owns is refused here, so that no run can
have two of it. JSON has no comments, so the key "_comment" may hold lines of text, at the top and in every section.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlm_dist.engine.nvme import check_nvme, uses_nvme
from vlm_dist.engine.runtime import prepare_deepspeed
from vlm_dist.errors import ConfigError

#: Holds a line of text, or a list of them; DeepSpeed never sees it.
COMMENT = "_comment"

#: Top-level keys that a file may have, and what they hold; a dict names the keys of a section.
ALLOWED: dict[str, Any] = {
    "zero_optimization": dict,
    "aio": {
        "block_size": int,
        "queue_depth": int,
        "intra_op_parallelism": int,
        "single_submit": bool,
        "overlap_events": bool,
        "use_gds": bool,
    },
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "disable_python_gc": bool,
    "comms_logger": {"enabled": bool, "prof_all": bool, "prof_ops": list, "verbose": bool, "debug": bool},
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": float,
        "profile_step": int,
        "module_depth": int,
        "top_modules": int,
        "detailed": bool,
        "output_file": str,
    },
}

#: Valid DeepSpeed keys whose value has another owner.
OWNED = {
    "train_batch_size": "follows from train_config.yaml: per_device_train_batch_size, gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "is train_config.yaml: per_device_train_batch_size",
    "gradient_accumulation_steps": "is train_config.yaml: gradient_accumulation_steps",
    "bf16": "is train_config.yaml: bf16",
    "bfloat16": "is train_config.yaml: bf16",
    "fp16": "is train_config.yaml: fp16",
    "torch_autocast": "is replaced by train_config.yaml: bf16, fp16",
    "gradient_clipping": "is train_config.yaml: max_grad_norm",
    "optimizer": "is train_config.yaml: learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon",
    "scheduler": "is train_config.yaml: lr_scheduler_type, warmup_ratio, warmup_steps",
    "activation_checkpointing": "is train_config.yaml: gradient_checkpointing",
    "tensorboard": "is train_config.yaml: report_to",
    "wandb": "is train_config.yaml: report_to",
    "csv_monitor": "is train_config.yaml: report_to",
    "comet": "is train_config.yaml: report_to",
    "checkpoint": "is train_config.yaml: save_steps, save_total_limit, resume",
    "managed_gradient_accumulation": "is set by vlm-dist, so that the gradient is that of the whole step",
    "gradient_allreduce_op": "is set by vlm-dist, so that the gradient is that of the whole step",
    "prescale_gradients": "is set by vlm-dist, so that the gradient is that of the whole step",
    "gradient_predivide_factor": "is set by vlm-dist, so that the gradient is that of the whole step",
    "communication_data_type": "is set by vlm-dist: gradients are summed in float32",
    "seq_parallel_communication_data_type": "is set by vlm-dist: gradients are summed in float32",
    "data_types": "is set by vlm-dist: gradients are summed in float32",
    "timers": "is set by vlm-dist: DeepSpeed's throughput timer stalls the device",
    "zero_force_ds_cpu_optimizer": "is set by vlm-dist",
    "zero_allow_untested_optimizer": "is set by vlm-dist",
}

#: Valid DeepSpeed keys for features that are not built.
NOT_YET = (
    "autotuning",
    "compile",
    "data_efficiency",
    "datastates",
    "disable_allgather",
    "expert_parallel",
    "hybrid_engine",
    "pipeline",
    "sequence_parallel_size",
    "tensor_parallel",
    "use_data_before_expert_parallelism",
    "weight_quantization",
)

_NO_EFFECT = "has no effect here: vlm-dist writes its own checkpoints, at any stage; remove it"

#: Keys of zero_optimization that are refused whatever their value is.
ZERO_REFUSED = {
    "cpu_offload": 'is outdated; write "offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": 'is outdated; write "offload_param": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "is outdated; write pin_memory inside offload_optimizer or offload_param",
    "legacy_stage1": "is outdated; remove it",
    "elastic_checkpoint": _NO_EFFECT,
    "load_from_fp32_weights": _NO_EFFECT,
    "pipeline_loading_checkpoint": _NO_EFFECT,
    "stage3_gather_16bit_weights_on_model_save": _NO_EFFECT,
    "stage3_gather_fp16_weights_on_model_save": _NO_EFFECT,
    "save_muon_momentum_buffer_in_memory": "has no effect here: the optimizer is AdamW; remove it",
    "zenflow": "is not supported: it updates with gradients of steps before; remove it",
    "zero_quantized_gradients": "is not supported: gradients are summed in float32; LoRA's are small; remove it",
    "zero_quantized_nontrainable_weights": "is not supported: DeepSpeed has it for float16 only, and the base would no "
    "longer be the one that the adapter is used with; remove it",
    "zero_quantized_weights": "is not supported: every weight that a forward meets would be off by 0.9% (int8 in "
    "groups of 8,000), five times bfloat16's rounding, and the adapter would be fitted to that; remove it",
}


class _Problems:
    """Collects what is wrong in a file, each with its line."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self._text = text
        self.lines: list[str] = []

    def add(self, dotted: str, message: str) -> None:
        """Report a key by its dotted name."""
        found = re.search(rf'"{re.escape(dotted.rsplit(".", 1)[-1])}"\s*:', self._text)
        line = f":{self._text.count(chr(10), 0, found.start()) + 1}" if found else ""
        self.lines.append(f"{self.path}{line}: {dotted} {message}")

    def unknown(self, dotted: str, valid: Iterable[str]) -> None:
        """Report a key that DeepSpeed does not have, with the nearest one that it has."""
        near = difflib.get_close_matches(dotted.rsplit(".", 1)[-1], list(valid), n=1, cutoff=0.6)
        self.add(dotted, "is not a DeepSpeed key" + (f"; did you mean {near[0]}?" if near else ""))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Keep JSON from silently dropping the first of two equal keys."""
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"key {twice[0]} appears twice")
    return dict(pairs)


def load_deepspeed_json(path: Path) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON file. Needs no GPU and no process group.

    Args:
        path: of the file.

    Returns:
        Its content, for `merge_deepspeed_config`.

    Raises:
        ConfigError: with all problems, each with file, line and key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a DeepSpeed JSON: {error}") from error
    try:
        content = json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    problems = _Problems(Path(path), text)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(content).__name__}")
    content = _without_comments("", content, problems)
    _find_auto("", {key: value for key, value in content.items() if key in ALLOWED}, problems)
    _check_top_level(content, problems)
    if isinstance(content.get("zero_optimization"), dict):
        _check_zero(content["zero_optimization"], problems)
        if "aio" in content and not uses_nvme(content["zero_optimization"]):
            problems.add("aio", 'has no effect: nothing is offloaded to "nvme"; remove it')
    elif "zero_optimization" not in content:
        problems.lines.append(f'{path}: zero_optimization is missing; write "zero_optimization": {{"stage": 2}}')
    if problems.lines:
        raise ConfigError("\n".join(problems.lines))
    return content


def _without_comments(prefix: str, section: Mapping[str, Any], problems: _Problems) -> dict[str, Any]:
    """The section without its comments, at any depth."""
    kept = {}
    for key, value in section.items():
        if key == COMMENT:
            lines = value if isinstance(value, list) else [value]
            if not all(isinstance(line, str) for line in lines):
                problems.add(f"{prefix}{key}", f"is {value!r}, expected a line of text or a list of them")
        else:
            kept[key] = _without_comments(f"{prefix}{key}.", value, problems) if isinstance(value, dict) else value
    return kept


def _find_auto(prefix: str, section: Mapping[str, Any], problems: _Problems) -> None:
    """Refuse "auto": only the Hugging Face trainer fills it in."""
    for key, value in section.items():
        if value == "auto":
            problems.add(f"{prefix}{key}", 'is "auto"; write a value, or leave the key out for the default')
        elif isinstance(value, Mapping):
            _find_auto(f"{prefix}{key}.", value, problems)


def _check_top_level(content: Mapping[str, Any], problems: _Problems) -> None:
    for key, value in content.items():
        if key in OWNED:
            problems.add(key, f"{OWNED[key]}; remove it here")
        elif key in NOT_YET:
            problems.add(key, "is not yet supported")
        elif key not in ALLOWED:
            problems.unknown(key, [*ALLOWED, *OWNED, *NOT_YET])
        elif value == "auto":
            continue
        elif isinstance(ALLOWED[key], dict):
            if not isinstance(value, dict):
                problems.add(key, f"is {value!r}, expected an object")
                continue
            for name, inner in value.items():
                if name not in ALLOWED[key]:
                    problems.unknown(f"{key}.{name}", ALLOWED[key])
                elif inner is not None and inner != "auto":
                    _check_type(f"{key}.{name}", inner, ALLOWED[key][name], problems)
        else:
            _check_type(key, value, ALLOWED[key], problems)


def _check_type(dotted: str, value: Any, expected: type, problems: _Problems) -> None:
    fits = isinstance(value, expected) or (expected is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and expected is not bool):
        problems.add(dotted, f"is {value!r}, expected {'an object' if expected is dict else expected.__name__}")


def _check_zero(section: dict[str, Any], problems: _Problems) -> None:
    """Check zero_optimization against DeepSpeed's own schema, then against what vlm-dist can keep its promises with."""
    prepare_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from pydantic import ValidationError

    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    nested = {
        "offload_optimizer": set(DeepSpeedZeroOffloadOptimizerConfig.model_fields),
        "offload_param": set(DeepSpeedZeroOffloadParamConfig.model_fields),
        "leaf_module": set(DeepSpeedZeroLeafModuleConfig.model_fields),
    }
    known: dict[str, Any] = {}
    for key, value in section.items():
        dotted = f"zero_optimization.{key}"
        if key in ZERO_REFUSED:
            problems.add(dotted, ZERO_REFUSED[key])
        elif key not in names:
            problems.unknown(dotted, names)
        elif key in nested and isinstance(value, dict):
            for unknown in [name for name in value if name not in nested[key]]:
                problems.unknown(f"{dotted}.{unknown}", nested[key])
            known[key] = {name: inner for name, inner in value.items() if name in nested[key] and inner != "auto"}
        elif value != "auto":
            known[key] = value
    stage = known.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        problems.add("zero_optimization.stage", f"is {stage!r}, expected 0, 1, 2 or 3")
        return
    try:
        DeepSpeedZeroConfig(**known)
    except ValidationError as error:
        for found in error.errors():
            dotted = ".".join(["zero_optimization", *map(str, found["loc"])])
            problems.add(dotted, f"is {found['input']!r}: {found['msg']}")
        return
    _check_promises(known, problems)


def _check_promises(section: Mapping[str, Any], problems: _Problems) -> None:
    """Refuse values that DeepSpeed takes but that would break exact gradients, or that would silently do nothing."""
    stage = section.get("stage", 0)
    if "stage" not in section:
        problems.lines.append(f'{problems.path}: zero_optimization.stage is missing; write "stage": 2 (0 to 3)')
        return
    if stage == 0:
        for key in section.keys() - {"stage"}:
            problems.add(f"zero_optimization.{key}", "has no effect at stage 0: nothing is partitioned; remove it")
        return
    if stage == 1 and section.get("overlap_comm"):
        problems.add("zero_optimization.overlap_comm", "needs stage 2 or 3; remove it or set the stage to 2")
    if not section.get("ignore_unused_parameters", True):
        problems.add(
            "zero_optimization.ignore_unused_parameters",
            "must stay true: a parameter without a gradient in a step (a vision tower in text) is not an error",
        )
    if not section.get("compute_grad_norm", True):
        problems.add("zero_optimization.compute_grad_norm", "must stay true: clipping and metrics need the norm")
    if stage < 3:
        for key in section:
            if key.startswith(("stage3_", "zero_hpz")) or key in ("offload_param", "sub_group_size"):
                problems.add(f"zero_optimization.{key}", f"applies to stage 3 only, and the stage is {stage}")
    if stage == 1 and (section.get("offload_optimizer") or {}).get("device", "none") != "none":
        problems.add("zero_optimization.offload_optimizer", "needs stage 2 or 3; set the stage to 2")
    for key in ("offload_optimizer", "offload_param"):
        offload = section.get(key) or {}
        if offload.get("device") == "nvme":
            check_nvme(key, offload, problems.add)
        if offload.get("super_offload"):
            problems.add(f"zero_optimization.{key}.super_offload", 'is not supported: use "device": "cpu"')
        if offload.get("ratio", 1.0) != 1.0:
            problems.add(f"zero_optimization.{key}.ratio", "is not supported: all of the optimizer is offloaded")
