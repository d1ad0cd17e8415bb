"""Checkpoints: small, portable, atomic. Layout, publishing, retention, and what all ranks do together."""

from vlm_dist.checkpoint.adapter import AdapterExport, export_adapter
from vlm_dist.checkpoint.collective import (
    choose_checkpoint,
    leave_later_checkpoints,
    restore_checkpoint,
    save_adapter,
    save_best_adapter,
    save_checkpoint,
)
from vlm_dist.checkpoint.layout import Checkpoint
from vlm_dist.checkpoint.places import Places, find_places
from vlm_dist.checkpoint.retention import Retention
from vlm_dist.checkpoint.saver import CheckpointSaver
from vlm_dist.checkpoint.sliced_saver import SlicedCheckpointSaver
from vlm_dist.checkpoint.store import CheckpointStore, RunFacts
from vlm_dist.checkpoint.warm_start import StartingPoint, open_starting_point, start_from

__all__ = [
    "AdapterExport",
    "Checkpoint",
    "CheckpointSaver",
    "CheckpointStore",
    "Places",
    "Retention",
    "RunFacts",
    "SlicedCheckpointSaver",
    "StartingPoint",
    "choose_checkpoint",
    "export_adapter",
    "find_places",
    "leave_later_checkpoints",
    "open_starting_point",
    "restore_checkpoint",
    "save_adapter",
    "save_best_adapter",
    "save_checkpoint",
    "start_from",
]
