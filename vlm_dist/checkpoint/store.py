"""A run's checkpoints on disk: one process's view, without any collective."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vlm_dist.checkpoint import layout
from vlm_dist.checkpoint.adapter import AdapterExport
from vlm_dist.checkpoint.layout import Checkpoint
from vlm_dist.checkpoint.publish import publish_directory, remove_directory
from vlm_dist.engine import TrainableState
from vlm_dist.errors import CheckpointError


@dataclass(frozen=True)
class RunFacts:
    """What a resumed run needs besides tensors; JSON values only.

    Attributes:
        plan: state of the plan (`Plan.state(step)`).
        global_batch_size: samples per step; it belongs to the run, and wins on resume.
        resolved_config: YAML text of the whole configuration.
        scheduler: what the learning rate schedule was made from, for the reader; resume compares `resolved_config`.
        versions: library -> version.
        topology: ranks and ZeRO stage that wrote it; for the reader, they need not be the same on resume.
    """

    plan: Mapping[str, Any]
    global_batch_size: int
    resolved_config: str = ""
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    topology: Mapping[str, Any] = field(default_factory=dict)


class CheckpointStore:
    """Writes, finds and prunes the checkpoints of one output directory.

    Args:
        output_dir: of the run.
        save_total_limit: complete checkpoints to keep, at least 1; None keeps all.
        report: is told in words what was skipped, set aside or could not be deleted.
    """

    def __init__(
        self,
        output_dir: Path,
        save_total_limit: int | None = None,
        report: Callable[[str], None] = lambda message: None,
    ) -> None:
        if save_total_limit is not None and save_total_limit < 1:
            raise CheckpointError(f"save_total_limit is {save_total_limit}, expected at least 1, or null for no limit")
        self.output_dir = Path(output_dir)
        self._limit = save_total_limit
        self._report = report

    def save(self, step: int, trainable: TrainableState, adapter: AdapterExport, facts: RunFacts) -> Path:
        """Publish a checkpoint, then delete the oldest ones beyond the limit.

        Args:
            step: steps that are done.
            trainable: collected from the engine.
            adapter: the same, in PEFT's format.
            facts: the rest.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointError: it could not be written; older checkpoints are untouched.
        """
        target = self.output_dir / layout.checkpoint_name(step)
        publish_directory(target, lambda fresh: _write_checkpoint(fresh, step, trainable, adapter, facts))
        self._set_aside_later_than(step)
        self._prune()
        return target

    def save_adapter(self, adapter: AdapterExport) -> Path:
        """Publish the final adapter, for `PeftModel.from_pretrained`; without one, the weights that were trained.

        Raises:
            CheckpointError: it could not be written.
        """
        target = self.output_dir / layout.FINAL_ADAPTER
        publish_directory(target, lambda fresh: _write_adapter(fresh, adapter))
        return target

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is complete and undamaged; None without any. Newer ones are reported."""
        for _, path in layout.list_checkpoints(self.output_dir):
            try:
                return Checkpoint.open(path)
            except CheckpointError as error:
                self._report(f"skipped: {error}")
        return None

    def load(self, path: Path) -> Checkpoint:
        """Verify one checkpoint.

        Raises:
            CheckpointError: it is missing, incomplete or damaged.
        """
        return Checkpoint.open(Path(path))

    def _set_aside_later_than(self, step: int) -> None:
        """Rename checkpoints of a future that this run has left by resuming from an earlier one.

        Else the next automatic resume would take them, and retention would prefer them to what was just written.
        """
        for later, path in layout.list_checkpoints(self.output_dir):
            if later <= step:
                continue
            aside = next(
                candidate
                for number in range(1, 10_000)
                if not (candidate := path.parent / f"superseded-{number}-{path.name}").exists()
            )
            try:
                path.rename(aside)
            except OSError as error:
                raise CheckpointError(
                    f"{path} belongs to a run that was left by resuming earlier, and cannot be set aside: {error}. "
                    "Delete or rename it, or the next automatic resume would take it."
                ) from error
            self._report(f"{path.name} belongs to a run that was left by resuming earlier; renamed to {aside.name}")

    def _prune(self) -> None:
        """Delete complete checkpoints beyond the limit, oldest first; incomplete ones are left to the user."""
        if self._limit is None:
            return
        complete = [path for _, path in layout.list_checkpoints(self.output_dir) if layout.seems_whole(path)]
        for path in complete[self._limit :]:
            try:
                remove_directory(path)
            except CheckpointError as error:
                self._report(str(error))  # the run goes on: a checkpoint too many does no harm


def _write_adapter(directory: Path, adapter: AdapterExport) -> None:
    if adapter.config is not None:
        _write_json(directory / layout.ADAPTER_CONFIG, adapter.config)
        _write_tensors(directory / layout.ADAPTER_WEIGHTS, adapter.tensors)
    if adapter.outside:
        _write_tensors(directory / layout.TRAINED_WEIGHTS, adapter.outside)


def _write_checkpoint(
    directory: Path, step: int, trainable: TrainableState, adapter: AdapterExport, facts: RunFacts
) -> None:
    """Fill a checkpoint's directory; the marker comes last."""
    _write_adapter(directory, adapter)
    tensors = {
        f"{part}/{name}": getattr(state, part) for part in layout.PARTS for name, state in trainable.parameters.items()
    }
    _write_tensors(directory / layout.TRAINING_TENSORS, tensors)
    (directory / layout.RESOLVED_CONFIG).write_text(facts.resolved_config, encoding="utf-8")
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": layout.sha256_of(path)}
        for path in sorted(directory.iterdir())
    }
    state = {
        "format": layout.FORMAT,
        "step": step,
        "global_batch_size": facts.global_batch_size,
        "plan": facts.plan,
        "optimizer": {
            "step": trainable.step,
            "hyperparameters": trainable.hyperparameters,
            "loss_scaler": trainable.loss_scaler,
        },
        "scheduler": facts.scheduler,
        "topology": facts.topology,
        "versions": facts.versions,
        "files": files,
    }
    _write_json(directory / layout.TRAINING_STATE, state)
    marker = layout.sha256_of(directory / layout.TRAINING_STATE)
    (directory / layout.COMPLETE).write_text(marker + "\n", encoding="ascii")


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
