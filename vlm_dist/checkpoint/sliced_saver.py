"""Saving where the state is too large for one process: each rank writes its own share."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

from vlm_dist.checkpoint.layout import checkpoint_name
from vlm_dist.checkpoint.publish import being_sliced
from vlm_dist.checkpoint.saver import CheckpointSaver
from vlm_dist.checkpoint.slices import await_slices, remove_slices, write_slices
from vlm_dist.checkpoint.writer import CheckpointWriter, WriteFailure
from vlm_dist.distributed.patience import long_work

#: Of a rank 0 that leaves after a failure: how long it still waits for the others' files.
_LAST_SECONDS = 30.0


class SlicedCheckpointSaver(CheckpointSaver):
    """A saver all of whose ranks write; rank 0 publishes when all files are there. All ranks see one directory."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._slice_writer = CheckpointWriter()
        self._given_up_at = float("inf")

    @property
    def has_failed(self) -> bool:
        """Whether this rank could not write something that the others don't know of yet."""
        return self._slice_writer.has_failed or super().has_failed

    def finish(self) -> None:
        """Wait until everything is on the disk; see `CheckpointSaver.finish`."""
        with long_work(self._ranks, "this rank's part of the checkpoint to be written"):
            self._slice_writer.wait()
        self.settle()  # before rank 0 waits for a file that will not come
        super().finish()

    def close(self) -> None:
        """Wait until this rank's writing has ended, and a while for the others'."""
        self._given_up_at = time.monotonic() + _LAST_SECONDS
        self._slice_writer.wait()
        super().close()

    def _collect(self, position: int, name: str) -> Callable[[], None] | None:
        ranks, store = self._ranks, self._store
        token = ranks.broadcast_object(secrets.token_hex(8) if ranks.is_main else None)
        state = self._engine.save_slices(store.output_dir, name)
        target = store.output_dir / checkpoint_name(position)
        slices = state.slices
        self._slice_writer.submit(position, lambda: write_slices(target, ranks.rank, ranks.world_size, token, slices))
        weights = state.weights
        if weights is None:
            return None
        facts = self._facts(position)

        def publish() -> None:
            found = await_slices(target, ranks.world_size, token, lambda: time.monotonic() > self._given_up_at)
            self._publish(position, state, weights, facts, found)
            remove_slices(being_sliced(target))

        return publish

    def _take_failure(self) -> WriteFailure | None:
        return self._slice_writer.take_failure() or super()._take_failure()
