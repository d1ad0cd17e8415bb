"""Generated answers: how they are compared, and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    reference: str
    match: bool


def normalise_answer(text: str) -> str:
    """The form in which answers are compared: case folded, white space collapsed, ends stripped."""
    return " ".join(text.casefold().split())


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write a file of JSON lines, atomically.

    Raises:
        DataError: it cannot be written.
    """
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            for prediction in predictions:
                fields = {key: value for key, value in vars(prediction).items() if key != "index"}
                file.write(json.dumps(fields, ensure_ascii=False) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"cannot write the predictions to {path}: {error}") from error
