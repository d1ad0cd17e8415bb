"""Checkpoints: small, portable, atomic. Layout, publishing, retention, and what all ranks do together."""

from vlm_dist.checkpoint.adapter import AdapterExport, export_adapter
from vlm_dist.checkpoint.collective import choose_checkpoint, restore_checkpoint, save_adapter, save_checkpoint
from vlm_dist.checkpoint.layout import Checkpoint
from vlm_dist.checkpoint.store import CheckpointStore, RunFacts

__all__ = [
    "AdapterExport",
    "Checkpoint",
    "CheckpointStore",
    "RunFacts",
    "choose_checkpoint",
    "export_adapter",
    "restore_checkpoint",
    "save_adapter",
    "save_checkpoint",
]
