"""A run's checkpoints on disk: one process's view, without any collective."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_dist.checkpoint import layout
from vlm_dist.checkpoint.adapter import AdapterExport
from vlm_dist.checkpoint.claim import Claim
from vlm_dist.checkpoint.files import FileSet
from vlm_dist.checkpoint.layout import Checkpoint
from vlm_dist.checkpoint.publish import leftovers, publish_directory, remove_directory
from vlm_dist.checkpoint.retention import Best, Retention, forget_best, metric_value, read_best, write_best
from vlm_dist.checkpoint.slice_reader import PARTS
from vlm_dist.engine import SlicedState, TrainableState
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
        retention: which ones stay; all, unless it is said.
        report: is told in words what was skipped, set aside or could not be deleted.
    """

    def __init__(
        self,
        output_dir: Path,
        retention: Retention = Retention(),  # noqa: B008 - it cannot be changed
        report: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self._retention = retention
        self._report = report
        self._claim: Claim | None = None

    def has_any(self) -> bool:
        """Whether there are checkpoints, whole or not."""
        return bool(layout.list_checkpoints(self.output_dir))

    def claim(self) -> None:
        """Be the one who saves here: from now on another start of the run that does so, too, ends with its next save.

        Raises:
            CheckpointError: the directory cannot be written.
        """
        self._claim = Claim(self.output_dir)

    def tell(self, message: str) -> None:
        """Report something in words."""
        self._report(message)

    def recover(self) -> None:
        """Put right what a killed process left: for the one writer of this directory, before it writes."""
        for path, target in leftovers(self.output_dir):
            try:
                if path.suffix == ".old" and not target.exists():
                    path.rename(target)  # it was to be replaced, and the new one never came
                    self._report(f"{target.name} was about to be replaced by a run that was killed, and is back")
                else:
                    shutil.rmtree(path)
            except OSError as error:
                self._report(f"{path} was left by a run that was killed, and could not be removed: {error}")

    def save(
        self,
        step: int,
        trainable: TrainableState | SlicedState,
        adapter: AdapterExport,
        facts: RunFacts,
        slices: Mapping[Path, Mapping[str, Any]] | None = None,
    ) -> Path:
        """Publish a checkpoint, then delete those that need not stay.

        Args:
            step: steps that are done.
            trainable: collected from the engine.
            adapter: the same, in PEFT's format.
            facts: the rest.
            slices: of a `SlicedState`: the ranks' files, with their `bytes` and `sha256`.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointError: it could not be written; older checkpoints are untouched.
        """
        target = self.output_dir / layout.checkpoint_name(step)
        if self._claim is not None:
            self._claim.check()
        if _is_there(target) and not layout.seems_whole(target):
            self._set_aside(target, f"{target.name} is no whole checkpoint of this program")
        publish_directory(
            target, lambda fresh: _write_checkpoint(FileSet(fresh), step, trainable, adapter, facts, slices or {})
        )
        self.set_aside_later_than(step)
        forget_best(self.output_dir, step)  # it was that of the one that was replaced or set aside
        self._prune()
        return target

    def save_adapter(self, adapter: AdapterExport) -> Path:
        """Publish the final adapter, for `PeftModel.from_pretrained`; without one, the weights that were trained.

        Raises:
            CheckpointError: it could not be written.
        """
        return self._publish_final(lambda fresh: _write_adapter(FileSet(fresh), adapter))

    def publish_best(self, metric: str) -> tuple[Path, int] | None:
        """Publish the adapter of the best checkpoint as the final one.

        Args:
            metric: by which it is the best.

        Returns:
            Where it is, and of which step; None where there is no best one, or it is damaged.

        Raises:
            CheckpointError: it could not be written.
        """
        try:
            best = read_best(self.output_dir, metric)
            if best is None:
                return None
            source = Checkpoint.open(self.output_dir / layout.checkpoint_name(best.step)).path
        except CheckpointError as error:
            self._report(f"warning: {error}")
            return None

        def copy(fresh: Path) -> None:
            for name in layout.ADAPTER_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, fresh / name)

        return self._publish_final(copy), best.step

    def _publish_final(self, write: Callable[[Path], None]) -> Path:
        target = self.output_dir / layout.FINAL_ADAPTER
        if _is_there(target) and not layout.is_adapter(target):
            self._set_aside(target, f"{target.name} has something else than an adapter of this program")
        publish_directory(target, write)
        return target

    def latest(self, report: Callable[[str], None] | None = None) -> Checkpoint | None:
        """The newest checkpoint that is complete and undamaged; None without any.

        Args:
            report: is told which newer ones are skipped and why; None: who hears of everything else.
        """
        for _, path in layout.list_checkpoints(self.output_dir):
            try:
                return Checkpoint.open(path)
            except CheckpointError as error:
                (report or self.tell)(f"skipped: {error}")
        return None

    def load(self, path: Path) -> Checkpoint:
        """Verify one checkpoint.

        Raises:
            CheckpointError: it is missing, incomplete or damaged.
        """
        return Checkpoint.open(Path(path))

    def set_aside_later_than(self, step: int) -> None:
        """Rename checkpoints of a future that this run has left by resuming from an earlier one.

        Else the next automatic resume would take them, and retention would prefer them to what was just written.

        Raises:
            CheckpointError: one cannot be renamed.
        """
        for later, path in layout.list_checkpoints(self.output_dir):
            if later > step:
                is_ours = layout.seems_whole(path)
                which = "belongs to a run that was left by resuming earlier" if is_ours else "is no whole checkpoint"
                self._set_aside(path, f"{path.name} {which}")

    def _set_aside(self, path: Path, why: str) -> None:
        """Rename what is in the way: nothing that may be of use to somebody is deleted."""
        aside = next(
            candidate
            for number in range(1, 10_000)
            if not _is_there(candidate := path.parent / f"superseded-{number}-{path.name}")
        )
        try:
            path.rename(aside)
        except OSError as error:
            raise CheckpointError(
                f"{path}: {why}, and it cannot be set aside: {error}. Delete or rename it: it is in the way of this run"
            ) from error
        self._report(f"{why}; renamed to {aside.name}")

    def mark(self, step: int, figures: Mapping[str, Any]) -> None:
        """Judge a checkpoint by the evaluation of its step: if it is the best so far, it stays.

        Args:
            step: of the checkpoint; nothing happens where there is none.
            figures: of the evaluation.

        Raises:
            CheckpointError: the mark could not be written.
        """
        metric = self._retention.metric
        if metric is None or not (self.output_dir / layout.checkpoint_name(step)).is_dir():
            return
        value = metric_value(metric, figures)
        if value is None:
            self._report(f"{layout.checkpoint_name(step)} is not judged: its evaluation has no number for {metric}")
            return
        try:
            best = read_best(self.output_dir, metric)
        except CheckpointError as error:
            self._report(
                f"{error}; {layout.checkpoint_name(step)} is the best from now on, until there is a better one"
            )
            best = None
        sign = 1 if self._retention.is_greater_better else -1
        if best is None or best.step == step or sign * value > sign * best.value:
            write_best(self.output_dir, Best(step, metric, value), self._retention.is_greater_better)
            self._prune()

    def _prune(self) -> None:
        """Delete complete checkpoints that need not stay, oldest first; incomplete ones are left to the user."""
        if self._retention.total_limit is None:
            return
        try:
            best = read_best(self.output_dir, self._retention.metric) if self._retention.metric else None
        except CheckpointError as error:
            self._report(f"{error}; no checkpoint is deleted before the next evaluation, as one of them is the best")
            return
        complete = {step: path for step, path in layout.list_checkpoints(self.output_dir) if layout.seems_whole(path)}
        for step in self._retention.doomed(complete, best.step if best is not None else None):
            try:
                remove_directory(complete[step])
            except CheckpointError as error:
                self._report(str(error))  # the run goes on: a checkpoint too many does no harm


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # one that leads nowhere is in the way, too


def _write_adapter(files: FileSet, adapter: AdapterExport) -> None:
    if adapter.config is not None:
        files.write_json(layout.ADAPTER_CONFIG, adapter.config)
        files.write_tensors(layout.ADAPTER_WEIGHTS, adapter.tensors)
    if adapter.outside:
        files.write_tensors(layout.TRAINED_WEIGHTS, adapter.outside)


def _write_checkpoint(
    files: FileSet,
    step: int,
    trainable: TrainableState | SlicedState,
    adapter: AdapterExport,
    facts: RunFacts,
    slices: Mapping[Path, Mapping[str, Any]],
) -> None:
    """Fill a checkpoint's directory; the marker comes last."""
    _write_adapter(files, adapter)
    more: dict[str, Any] = {"format": layout.FORMAT}
    if isinstance(trainable, SlicedState):
        for path, known in slices.items():
            files.adopt(path, known)
        shapes = {name: list(shape) for name, shape in trainable.shapes.items()}
        more = {"format": layout.SLICED_FORMAT, "shapes": shapes}
    else:
        states = trainable.parameters.items()
        tensors = {f"{part}/{name}": getattr(state, part) for part in PARTS for name, state in states}
        files.write_tensors(layout.TRAINING_TENSORS, tensors)
    files.write_text(layout.RESOLVED_CONFIG, facts.resolved_config)
    state = {
        **more,
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
        "files": dict(files.facts),
    }
    files.write_json(layout.TRAINING_STATE, state)
    files.write_text(layout.COMPLETE, files.facts[layout.TRAINING_STATE]["sha256"] + "\n")
