"""What all ranks do together outside the loop: choose a checkpoint, restore it, and publish the adapter of the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vlm_dist.checkpoint.adapter import export_adapter
from vlm_dist.checkpoint.layout import TRAINING_STATE, Checkpoint
from vlm_dist.checkpoint.places import Places
from vlm_dist.checkpoint.store import CheckpointStore, RunFacts
from vlm_dist.distributed.failures import agree_on_failure, describe_failure, raise_first
from vlm_dist.distributed.group import Ranks
from vlm_dist.engine import Engine, TrainableState
from vlm_dist.errors import CheckpointError


def save_checkpoint(store: CheckpointStore, engine: Engine, ranks: Ranks, step: int, facts: RunFacts) -> Path:
    """Collect from all ranks, write on rank 0, and wait for it: without a loop that could go on. Collective.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: on every rank, if rank 0 could not write.
    """
    trainable = engine.save(store.output_dir, f"step-{step}")
    path = None
    with agree_on_failure(ranks):
        if trainable is not None:
            masters = {name: state.master for name, state in trainable.parameters.items()}
            adapter = export_adapter(engine.module, masters, engine.compute_dtype)
            path = store.save(step, trainable, adapter, facts)
    return ranks.broadcast_object(path)


def save_adapter(store: CheckpointStore, engine: Engine, ranks: Ranks) -> Path:
    """Write the final adapter to output_dir/adapter. Collective: every rank calls this.

    Raises:
        CheckpointError: on every rank, if rank 0 could not write.
    """
    weights = engine.collect_weights()
    path = None
    with agree_on_failure(ranks):
        if weights is not None:
            path = store.save_adapter(export_adapter(engine.module, weights, engine.compute_dtype))
    return ranks.broadcast_object(path)


def save_best_adapter(store: CheckpointStore, metric: str, ranks: Ranks) -> tuple[Path, int] | None:
    """Write the best checkpoint's adapter to output_dir/adapter. Collective: every rank calls this.

    Returns:
        Where it is, and of which step; None where no checkpoint is the best by the metric, or it is damaged.

    Raises:
        CheckpointError: on every rank, if rank 0 could not write.
    """
    published = None
    with agree_on_failure(ranks):
        if ranks.is_main:
            published = store.publish_best(metric)
    shared: tuple[Path, int] | None = ranks.broadcast_object(published)
    return shared


def choose_checkpoint(
    store: CheckpointStore, ranks: Ranks, resume: str | bool | Path, places: Places | None = None
) -> Checkpoint | None:
    """Find what to resume from, before the engine exists. Collective: every rank calls this.

    Args:
        store: of the run; only the writers' are used, so the others need not see the same disk.
        ranks: this process among its peers.
        resume: `auto` (the newest complete checkpoint on any node, if there is one), false, or the path of one.
        places: who writes; None: rank 0 alone.

    Returns:
        The same verified checkpoint on every rank, or None.

    Raises:
        CheckpointError: on every rank: the given path cannot be used on any node.
    """
    if resume is False or resume == "false":
        return None
    is_auto = resume is True or resume == "auto"
    chosen, failure = None, None
    skipped: list[str] = []
    try:
        if ranks.is_main if places is None else places.is_writer:
            chosen = store.latest(skipped.append) if is_auto else store.load(Path(str(resume)))
    except Exception as error:  # noqa: BLE001 - raised below, where no other node has one
        failure = error
    answers = ranks.gather_objects((chosen, describe_failure(failure), skipped))
    for rank, (_, _, lines) in enumerate(answers):
        for line in lines:  # only the main rank's reports are seen
            store.tell(f"{places.name(rank)}: {line}" if places is not None and places.are_copies else line)
    found = [replace(checkpoint, owner=rank) for rank, (checkpoint, *_) in enumerate(answers) if checkpoint is not None]
    if not found:
        raise_first(ranks, [told for _, told, _ in answers], failure)
        if any(lines for *_, lines in answers):
            store.tell("no checkpoint can be used: the run begins at step 0")
        return None
    return max(found, key=lambda checkpoint: (checkpoint.step, -checkpoint.owner))


def restore_checkpoint(checkpoint: Checkpoint, engine: Engine, ranks: Ranks) -> None:
    """Put a checkpoint's masters and moments into the engine. Collective: every rank calls this.

    Raises:
        CheckpointError: on every rank: the file cannot be read, or its parameters are not this model's.
    """
    if checkpoint.is_sliced and all(ranks.gather_objects((checkpoint.path / TRAINING_STATE).is_file())):
        _restore_own_shares(checkpoint, engine, ranks)
        return
    trainable: TrainableState | None = None
    with agree_on_failure(ranks):
        if ranks.rank == checkpoint.owner:
            trainable = checkpoint.read_trainable()
    try:
        engine.restore_trainable(trainable, checkpoint.owner)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def leave_later_checkpoints(store: CheckpointStore, ranks: Ranks, places: Places, step: int) -> None:
    """Set aside what is newer than the checkpoint that the run was told to resume from. Collective.

    Not only with the first save: a run that ends before it, and is started again by itself, resumes from the newest.

    Raises:
        CheckpointError: on every rank: one cannot be renamed.
    """
    with agree_on_failure(ranks):
        if places.is_writer:
            store.set_aside_later_than(step)


def _restore_own_shares(checkpoint: Checkpoint, engine: Engine, ranks: Ranks) -> None:
    """Each rank reads what it owns."""
    with agree_on_failure(ranks):
        slices = checkpoint.open_slices()
    optimizer = checkpoint.info["optimizer"]
    try:
        engine.restore_slices(slices.read, slices.shapes, int(optimizer["step"]), optimizer["loss_scaler"])
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
