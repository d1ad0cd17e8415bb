"""Checkpoints: small, portable, atomic. Layout, publishing, retention, and what all ranks do together."""

from vlm_dist.checkpoint.adapter import AdapterExport, export_adapter
from vlm_dist.checkpoint.collective import choose_checkpoint, restore_checkpoint, save_adapter, save_checkpoint
from vlm_dist.checkpoint.layout import Checkpoint
from vlm_dist.checkpoint.store import CheckpointStore, RunFacts
from vlm_dist.checkpoint.warm_start import StartingPoint, open_starting_point, start_from

__all__ = [
    "AdapterExport",
    "Checkpoint",
    "CheckpointStore",
    "RunFacts",
    "StartingPoint",
    "choose_checkpoint",
    "export_adapter",
    "open_starting_point",
    "restore_checkpoint",
    "save_adapter",
    "save_checkpoint",
    "start_from",
]
