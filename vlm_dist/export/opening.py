"""What is exported: the files of an adapter, the run that made it, and the two of them as one model in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_dist.build.answering import find_run_file, load_answering_config
from vlm_dist.build.data import make_processor
from vlm_dist.checkpoint import Checkpoint, StartingPoint
from vlm_dist.checkpoint.earlier_tokens import check_new_tokens
from vlm_dist.checkpoint.layout import (
    ADAPTER_FILES,
    COMPLETE,
    FINAL_ADAPTER,
    checkpoint_name,
    list_checkpoints,
    seems_whole,
    sha256_of,
)
from vlm_dist.checkpoint.retention import marked_best
from vlm_dist.config import RunConfig
from vlm_dist.errors import CheckpointError, ConfigError, ModelError
from vlm_dist.families import Family
from vlm_dist.model import load_model, make_room_for_tokens, prepare_checkpoint
from vlm_dist.model.registry import resolve_class
from vlm_dist.model.remote_code import is_remote

WHICH = ("final", "best", "latest")


@dataclass(frozen=True)
class Origin:
    """An adapter and the run that made it.

    Attributes:
        path: directory of the adapter.
        run_dir: `output_dir` of the run, as far as that can be told.
        config: of the run.
        point: the adapter, without its tensors.
        hashes: file -> sha256, of the adapter's files.
    """

    path: Path
    run_dir: Path
    config: RunConfig
    point: StartingPoint
    hashes: Mapping[str, str]

    @property
    def has_adapter(self) -> bool:
        """False: everything was trained in full, and there are weights by name alone."""
        return self.point.config is not None


def open_origin(
    path: Path, *, which: str | None = None, run_file: Path | None = None, base: str | None = None
) -> Origin:
    """Find an adapter and its run; reads no tensors.

    Args:
        path: a run's directory, its `adapter/`, or one of its checkpoints.
        which: of `WHICH`, in a run's directory; None: `adapter/`.
        run_file: of the run; None: the resolved_config.yaml in the directory or beside it.
        base: where the base model is now; None: where the run says.

    Raises:
        CheckpointError: there is no adapter, or a checkpoint is damaged.
        ConfigError: its run cannot be found or read.
    """
    chosen = _choose(path, which)
    if (chosen / COMPLETE).is_file():
        Checkpoint.open(chosen)  # every hash
    point = StartingPoint.open(chosen)
    found = run_file or find_run_file(chosen)
    try:
        config = load_answering_config(found, (), base)
    except ConfigError as error:
        if base is not None or "directory" not in str(error):
            raise
        raise ConfigError(f"{error}\n{found} names it as the run saw it; --base says where it is now") from error
    hashes = {name: sha256_of(chosen / name) for name in ADAPTER_FILES if (chosen / name).is_file()}
    return Origin(chosen, chosen.resolve().parent, config, point, hashes)


def _choose(path: Path, which: str | None) -> Path:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; name a run's adapter/, checkpoint-<step>/, or the run")
    if any((path / name).is_file() for name in ADAPTER_FILES):
        if which is not None:
            raise CheckpointError(f"--which {which} chooses within a run's directory; {path} is an adapter by itself")
        return path
    if which in (None, "final"):
        if not (path / FINAL_ADAPTER).is_dir():
            raise CheckpointError(
                f"{path} has no {FINAL_ADAPTER}/: the run is not at its end; --which latest takes its newest "
                "checkpoint, --which best the best one"
            )
        return path / FINAL_ADAPTER
    if which == "best":
        best = marked_best(path)
        if best is None:
            raise CheckpointError(f"{path} has no best checkpoint; a run has one with train.metric_for_best_model")
        return path / checkpoint_name(best.step)
    whole = [found for _, found in list_checkpoints(path) if seems_whole(found)]
    if not whole:
        raise CheckpointError(f"{path} has no complete checkpoint")
    return whole[0]


@dataclass
class OpenModel:
    """A base model in float32 on the CPU, and what goes with it.

    Attributes:
        model: without adapter.
        processor: of the run, with its new tokens.
        family: its row.
    """

    model: Any
    processor: Any
    family: Family


def open_base(origin: Origin) -> OpenModel:
    """Load the base as the run has, but in float32 and unpacked.

    Raises:
        ModelError: it cannot be loaded, or is one that cannot be written in a form that others load.
    """
    config = origin.config
    loading = config.model.loading_for(config.model_id)
    model_class = resolve_class(
        config.model_entry, "model_class", config.model_id, trust_remote_code=loading.trust_remote_code,
        revision=loading.revision,
    )  # fmt: skip
    if is_remote(model_class):
        raise ModelError(
            f"{config.model_id} is made by code of its own repository, which this program changes in memory to train "
            "it: a merged copy is not written. Use the adapter with that repository: PeftModel.from_pretrained(base, "
            f"'{origin.path}')"
        )
    processor, family = make_processor(config)
    check_new_tokens(origin.point, processor)
    prepare_checkpoint(config.model_id, config.model_entry, loading)
    model: Any = load_model(config.model_id, config.model_entry, loading.model_dump(), dtype=torch.float32)
    make_room_for_tokens(model, processor.new_token_ids, config.train.seed)
    return OpenModel(model.eval(), processor, family)


def with_adapter(origin: Origin, base: Any) -> Any:
    """The base with what was trained, put there by PEFT alone, or by name where there is no adapter.

    Args:
        origin: of the adapter.
        base: from `open_base`; is changed.

    Raises:
        CheckpointError: the file has other names or shapes than the model, so that some of it would be left out.
    """
    if not origin.has_adapter:
        tensors = origin.point.read()
        stray = sorted(set(tensors) - {name for name, _ in base.named_parameters(remove_duplicate=False)})
        _refuse_strays(origin, stray)
        base.load_state_dict(tensors, strict=False)
        return base
    from peft import PeftModel

    try:
        model: Any = PeftModel.from_pretrained(base, str(origin.path), torch_device="cpu")
    except (RuntimeError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{origin.path} does not fit {origin.config.model_id}: PEFT says: {first}") from error
    stray, lacking = compare_names(origin, model)
    _refuse_strays(origin, stray)
    if lacking:
        raise CheckpointError(
            f"{origin.path}: {len(lacking)} LoRA weights are not in its file, e.g. {lacking[0]}: PEFT starts these "
            "at random without a word"
        )
    return model.eval()


def _refuse_strays(origin: Origin, stray: list[str]) -> None:
    if stray:
        raise CheckpointError(
            f"{origin.path}: {len(stray)} of {len(origin.point.shapes)} weights have names that the model does not "
            f"know, e.g. {stray[0]}: PEFT leaves them out without a word"
        )


def compare_names(origin: Origin, model: Any) -> tuple[list[str], list[str]]:
    """Names of the file that PEFT did not use, and LoRA weights of the model that the file lacks."""
    from peft import get_peft_model_state_dict

    known = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    in_place = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stray = sorted(set(origin.point.shapes) - known - in_place)
    lacking = sorted(key for key in known if ".lora_" in key and key not in origin.point.shapes)
    return stray, lacking


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers with LoRA, by name."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_B") and hasattr(module, "base_layer"):
            yield name, module
