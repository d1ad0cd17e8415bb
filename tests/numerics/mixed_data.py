"""A tiny run over pictures, clips, albums of several pictures, and texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tests.tiny_run import TinyRun, make_tiny_run
from tests.unit.data.faults import picture

NUM_SAMPLES = {"images": 18, "clips": 7, "albums": 10, "texts": 10}
SOURCES = json.dumps(
    [
        {"name": "images", "type": "tar", "path": "data/images", "columns": {"image": "png"}},
        {"name": "clips", "type": "tar", "path": "data/clips", "columns": {"video": "mp4"}},
        {"name": "albums", "type": "jsonl", "path": "data/albums.jsonl"},
        {"name": "texts", "type": "jsonl", "path": "data/texts.jsonl"},
    ]
)
#: Overrides that put all of them into training.
ALL_SOURCES = (f"data.train={SOURCES}", "data.eval=[]")


def make_mixed_run(directory: Path, num_samples: Mapping[str, int] = NUM_SAMPLES) -> TinyRun:
    """Samples of four kinds, of different sizes and lengths."""
    made = make_tiny_run(directory, num_images=num_samples["images"], num_clips=num_samples["clips"])
    for number in range(5):
        (directory / "data" / f"{number}.png").write_bytes(picture("PNG", 40 + 9 * number, 60 - 5 * number))
    albums = [
        {
            "image": [f"{(number + i) % 5}.png" for i in range(2 + number % 3)],
            "question": "same?",
            "answer": "no " * (number % 4 + 1),
            "video": None,
        }
        for number in range(num_samples["albums"])
    ]
    texts = [
        {
            "question": "how many " * (number % 3 + 1),
            "answer": str(number) * (number % 5 + 1),
            "image": None,
            "video": None,
        }
        for number in range(num_samples["texts"])
    ]
    for name, rows in (("albums", albums), ("texts", texts)):
        write_rows(directory / "data" / f"{name}.jsonl", rows)
    return made


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write a JSONL source."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
