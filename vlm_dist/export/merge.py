"""`export merge`: base and adapter become one model, in the form in which the base was published."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_dist import __version__
from vlm_dist.errors import CheckpointError
from vlm_dist.export.card import write_card
from vlm_dist.export.opening import Origin, open_base, with_adapter
from vlm_dist.model import parse_dtype
from vlm_dist.observability.findings import size_text

#: Which files went in; beside the weights.
MERGE_INFO = "merge_info.json"
#: Files of processor and configuration, and room to breathe.
_MARGIN_BYTES = 64 * 2**20


def merge(
    origin: Origin,
    target: Path,
    *,
    dtype: str = "bfloat16",
    max_shard_size: str = "5GB",
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Write a merged model: weights, configuration, processor, card.

    The sum is made in float32, and rounded once. Needs 4 bytes of memory for each parameter of the base.

    Args:
        origin: of the adapter.
        target: directory that does not exist yet, or is empty.
        dtype: of the weights that are written.
        max_shard_size: of one file, such as "5GB".
        report: takes lines for people.

    Raises:
        CheckpointError: the adapter does not fit, the target is not empty, or the disk is full.
        ModelError: the base cannot be loaded, or not be written again.
    """
    wanted = parse_dtype(dtype)
    _check_target(target)
    report(f"base {origin.config.model_id}, adapter {origin.path}: merging in float32 on the CPU")
    opened = open_base(origin)
    count = sum(parameter.numel() for parameter in opened.model.parameters())
    _check_room(target, count * wanted.itemsize)
    if origin.config.peft.quantization != "none":
        report(
            f"notice: it was trained on a base in {origin.config.peft.quantization}; it is merged into the unpacked "
            "one, which differs from that by what packing has rounded"
        )
    merged = merged_model(origin, opened.model).to(wanted)
    temporary = target.with_name(f".{target.name}.writing")
    if temporary.exists():
        shutil.rmtree(temporary)
    try:
        temporary.mkdir(parents=True)
        _switch_cache_on(merged)
        merged.save_pretrained(temporary, max_shard_size=max_shard_size)
        opened.processor.save_pretrained(temporary)
        facts = _facts(origin, dtype)
        (temporary / MERGE_INFO).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        write_card(temporary, origin, facts)
        for file in temporary.iterdir():  # safetensors writes for its owner alone
            file.chmod(0o666 & ~_umask())
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{target} cannot be written: {error}") from error
    size = sum(file.stat().st_size for file in target.iterdir())
    report(f"wrote {target}: {count:,} parameters in {dtype}, {size_text(size)}")


def merged_model(origin: Origin, base: Any) -> Any:
    """Base and adapter as one, in float32; a plain model of transformers.

    Raises:
        CheckpointError: the adapter does not fit, or the sum is not finite.
    """
    adapted = with_adapter(origin, base)
    if not origin.has_adapter:
        return adapted
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT: NaNs in the merged weights
        raise CheckpointError(f"{origin.path}: {error}") from error
    merged.tie_weights()
    _check_finite(merged)
    return merged


def _check_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(f"merged: {name} is not finite: the run had diverged, or the base is damaged")


def _check_target(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; name a new directory with -o")
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{target} is not empty; name a new directory with -o")
    parent = next(parent for parent in target.absolute().parents if parent.exists())
    if not os.access(parent, os.W_OK) or not parent.is_dir():
        raise CheckpointError(f"{target} cannot be written: no right to write in {parent}")


def _check_room(target: Path, num_bytes: int) -> None:
    parent = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < num_bytes + _MARGIN_BYTES:
        raise CheckpointError(
            f"{target} needs {size_text(num_bytes + _MARGIN_BYTES)}, and {size_text(free)} are free in {parent}"
        )


def _umask() -> int:
    """Of this process; asking is setting."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _switch_cache_on(model: Any) -> None:
    """Training has switched the key-value cache off; the published configuration has it on."""
    names = getattr(model.config, "sub_configs", None) or {}
    for config in (model.config, *(getattr(model.config, name, None) for name in names)):
        if config is not None and getattr(config, "use_cache", None) is False:
            config.use_cache = True


def _facts(origin: Origin, dtype: str) -> dict[str, Any]:
    revision = origin.config.model.loading_for(origin.config.model_id).revision
    return {
        "base": origin.config.model_id,
        "base_revision": revision,
        "adapter": str(origin.path),
        "adapter_sha256": dict(origin.hashes),
        "dtype": dtype,
        "versions": {"vlm-dist": __version__, **{name: version(name) for name in ("torch", "transformers", "peft")}},
    }
