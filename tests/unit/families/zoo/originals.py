"""Checkpoints in the formats of their authors' own code, loaded by the entries of the guide."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.unit.model import original_internvl, original_phi3
from vlm_dist.config.vlm_model import ModelClassEntry


@dataclass(frozen=True)
class OriginalCheckpoint:
    """A checkpoint that transformers alone does not load.

    Attributes:
        entry: its lines in `model_classes`.
        save: writes it into a directory.
        model_type: of its config.json.
        missing: what has to be set for it to be there; None: it always is.
        params: of model and processor.
        processor_params: besides.
    """

    entry: ModelClassEntry
    save: Callable[[Path], Path]
    model_type: str
    missing: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    processor_params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def processor_class(self) -> str:
        assert self.entry.processor_class is not None
        return self.entry.processor_class


def _save_phi3_vision(directory: Path) -> Path:
    return original_phi3.save_phi3_vision(Path(os.environ[original_phi3.VARIABLE]), directory)


def _is_set(variable: str) -> bool:
    return variable in os.environ


#: By name.
ORIGINALS: dict[str, OriginalCheckpoint] = {
    "internvl2": OriginalCheckpoint(
        entry=original_internvl.ENTRY,
        save=lambda directory: original_internvl.save_original(directory, original_internvl.native_model()),
        model_type="internvl_chat",
    ),
    "phi3_v": OriginalCheckpoint(
        entry=original_phi3.ENTRY,
        save=_save_phi3_vision,
        model_type="phi3_v",
        missing=None if _is_set(original_phi3.VARIABLE) else original_phi3.VARIABLE,
        params={"trust_remote_code": True},
        processor_params={"num_crops": 1},  # a picture of 313 tokens
    ),
}
