"""What all ranks do together: save, choose a checkpoint, restore. Rank 0 alone touches the disk.

State is collected in the step's thread, straight from the engine: nothing of DeepSpeed's own saving is used, because it
is not safe against a crash. Only the collecting is collective; everything after `collect_trainable` is rank 0's alone
and works on tensors in its memory, so that it can move to a thread of its own.
"""

from __future__ import annotations

from pathlib import Path

from vlm_dist.checkpoint.adapter import export_adapter
from vlm_dist.checkpoint.layout import Checkpoint
from vlm_dist.checkpoint.store import CheckpointStore, RunFacts
from vlm_dist.distributed.failures import agree_on_failure
from vlm_dist.distributed.group import Ranks
from vlm_dist.engine import Engine, TrainableState
from vlm_dist.errors import CheckpointError


def save_checkpoint(store: CheckpointStore, engine: Engine, ranks: Ranks, step: int, facts: RunFacts) -> Path:
    """Collect from all ranks, write on rank 0. Collective: every rank calls this.

    Args:
        store: of the run; only rank 0's is used.
        engine: between two steps.
        ranks: this process among its peers.
        step: steps that are done.
        facts: what a resumed run needs besides tensors.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: on every rank, if rank 0 could not write.
    """
    trainable = engine.collect_trainable()
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
    trainable = engine.collect_trainable()
    path = None
    with agree_on_failure(ranks):
        if trainable is not None:
            masters = {name: state.master for name, state in trainable.parameters.items()}
            path = store.save_adapter(export_adapter(engine.module, masters, engine.compute_dtype))
    return ranks.broadcast_object(path)


def choose_checkpoint(store: CheckpointStore, ranks: Ranks, resume: str | bool | Path) -> Checkpoint | None:
    """Find what to resume from, before the engine exists. Collective: every rank calls this.

    Args:
        store: of the run; only rank 0's is used, so the others need not see the same disk.
        ranks: this process among its peers.
        resume: `auto` (the newest complete checkpoint, if any), false, or the path of one.

    Returns:
        The same verified checkpoint on every rank, or None.

    Raises:
        CheckpointError: on every rank: the given path cannot be used.
    """
    if resume is False or resume == "false":
        return None
    chosen = None
    with agree_on_failure(ranks):
        if ranks.is_main:
            chosen = store.latest() if resume is True or resume == "auto" else store.load(Path(resume))
    return ranks.broadcast_object(chosen)


def restore_checkpoint(checkpoint: Checkpoint, engine: Engine, ranks: Ranks) -> None:
    """Put a checkpoint's masters and moments into the engine. Collective: every rank calls this.

    Raises:
        CheckpointError: on every rank: the file cannot be read, or its parameters are not this model's.
    """
    trainable: TrainableState | None = None
    with agree_on_failure(ranks):
        if ranks.is_main:
            trainable = checkpoint.read_trainable()
    try:
        engine.restore_trainable(trainable)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
