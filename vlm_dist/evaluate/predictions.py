"""Generated answers, and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_dist.errors import DataError


@dataclass(frozen=True)
class Prediction:
    """One generated answer."""

    index: int  # row of the source: the order of the file
    source: str
    shard: str
    key: str
    prompt: str
    prediction: str
    references: tuple[str, ...]  # of which the answer may match any
    scores: Mapping[str, float | None] = field(default_factory=dict)  # by metric

    def as_record(self) -> dict[str, Any]:
        """One line of the file; `references` only where there are several."""
        several = {"references": list(self.references)} if len(self.references) > 1 else {}
        return {
            "source": self.source,
            "shard": self.shard,
            "key": self.key,
            "prompt": self.prompt,
            "prediction": self.prediction,
            "reference": self.references[0],
            **several,
            **self.scores,
        }


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write a file of JSON lines, atomically.

    Raises:
        DataError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            for prediction in predictions:
                file.write(json.dumps(prediction.as_record(), ensure_ascii=False) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"cannot write the predictions to {path}: {error}") from error
