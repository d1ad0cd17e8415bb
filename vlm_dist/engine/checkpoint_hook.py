"""DeepSpeed's `save_checkpoint`, of which only the occasion is left: where it commits, our own state is collected.

DeepSpeed asks its `checkpoint_engine` to write a module's state, the optimizer's shards and scripts to join them. None
of that is made here: no file, no state dict, no copy, and no parameter of the base is gathered. What its `commit` does,
on all ranks, is to collect masters and moments by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from vlm_dist.errors import CheckpointError

State = TypeVar("State")


class CheckpointHook(CheckpointEngine):  # type: ignore[misc]
    """Takes the place of `checkpoint_engine` in a DeepSpeed engine.

    Args:
        deepspeed_engine: after `deepspeed.initialize`; has nothing of its own to save from then on.
    """

    def __init__(self, deepspeed_engine: Any) -> None:
        super().__init__()
        assert not deepspeed_engine.has_moe_layers, "DeepSpeed's own experts have files of their own"
        self.name = "vlm_dist"
        self._deepspeed = deepspeed_engine
        self._collect: Callable[[], Any] = _make_nothing
        self._collected: Any = None
        deepspeed_engine.checkpoint_engine = self
        deepspeed_engine.save_zero_checkpoint = False  # the optimizer's shards
        deepspeed_engine._save_checkpoint = _make_nothing  # the state dict of the module
        # ZeRO-3 would partition what is small and gather it again, base and all: only those state dicts need it
        deepspeed_engine._optimizer_has_ckpt_event_prologue = _no
        deepspeed_engine._optimizer_has_ckpt_event_epilogue = _no
        deepspeed_engine.zero_nvme_offload_optimizer = _no  # asked only whether to copy its swap files
        deepspeed_engine.checkpoint_tag_validation_enabled = _no  # two reductions on the device for a name that we give

    def run(self, directory: str, tag: str, collect: Callable[[], State]) -> State:
        """Save a checkpoint as DeepSpeed does. Collective: every rank calls this.

        Args:
            directory: of the run; nothing is written there.
            tag: the checkpoint's name.
            collect: called on all ranks.

        Returns:
            What was collected.
        """
        self._collect = collect
        self._deepspeed.save_checkpoint(directory, tag=tag, save_latest=False, exclude_frozen_parameters=True)
        collected, self._collected = self._collected, None
        return collected  # type: ignore[no-any-return]

    def create(self, info: CheckpointCommitInfo) -> None:
        """Begin a checkpoint: nothing is there to prepare."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make no directory: the checkpoint room has its own."""

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Collect the state. Collective: DeepSpeed calls this on every rank."""
        self._collected = self._collect()
        return True

    def save(self, state_dict: Any, path: str) -> None:
        """Refuse what DeepSpeed would write in spite of all that: a checkpoint has no file of its making."""
        raise CheckpointError(f"DeepSpeed wants to write {path}, which no checkpoint of ours has; please report this")

    def load(self, path: str, map_location: Any = None) -> Any:
        """Refuse DeepSpeed's own files: they are pickles, and fit one number of ranks."""
        raise CheckpointError(f"{path} is a checkpoint of DeepSpeed's own, which is not read")


def _make_nothing(*arguments: Any, **named: Any) -> None:
    """Stand in for what would write a file."""


def _no() -> bool:
    return False
