"""How fast existing tars are indexed, against tarfile: `python -m tests.bench.tar_scan`.

Both sides run in turns in one process, on tars in the page cache. "walk" finds all members; "index" also reads the
facts that the planner needs (the picture's size, the length of the text), once as the project does it and once with
tarfile and Pillow.
"""

from __future__ import annotations

import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_dist.data.index.tar_headers import TarReader
from vlm_dist.data.index.tar_scan import scan_tar

_PAIRS = 20


def main() -> None:
    """Measure, and print a JSON line per figure."""
    with tempfile.TemporaryDirectory() as folder:
        for picture, quality, num_samples in ((32, 75, 4000), (448, 90, 1000)):
            for name, tar_format in (("ustar", tarfile.USTAR_FORMAT), ("pax", tarfile.PAX_FORMAT)):
                path = Path(folder) / f"{picture}-{name}.tar"
                num_bytes = _write(path, picture, quality, num_samples, tar_format)
                sides: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
                    "walk": (_walk, _walk_with_tarfile),
                    "index": (scan_tar, _index_with_tarfile),
                }
                for what, (ours, theirs) in sides.items():
                    own, peer, ratio = _measure(ours, theirs, path, 2 * num_samples)
                    line = {
                        "name": f"scan_{what}_{name}_{num_bytes // num_samples // 1024}KiB",
                        "value": round(own),
                        "unit": "members/s",
                        "peer": "tarfile" if what == "walk" else "tarfile and Pillow",
                        "peer_value": round(peer),
                        "ratio": round(ratio, 2),
                    }
                    print(json.dumps(line), flush=True)
    print(json.dumps({"summary": {"met": [], "missed": []}}))


def _write(path: Path, picture: int, quality: int, num_samples: int, tar_format: int) -> int:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (picture // 8, picture // 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize((picture, picture)).save(stream, "JPEG", quality=quality)
    document = json.dumps({"question": "What is on the picture?", "answer": "Squares of many colours. " * 8}).encode()
    mtime = 0 if tar_format == tarfile.USTAR_FORMAT else 1_700_000_000.25  # a PAX header for every member
    with tarfile.open(path, "w", format=tar_format) as archive:
        for i in range(num_samples):
            for extension, data in (("jpg", stream.getvalue()), ("json", document)):
                info = tarfile.TarInfo(f"{i:09d}.{extension}")
                info.size, info.mtime = len(data), mtime  # type: ignore[assignment]
                archive.addfile(info, io.BytesIO(data))
    return path.stat().st_size


def _measure(
    ours: Callable[[Path], object], theirs: Callable[[Path], object], path: Path, num_members: int
) -> tuple[float, float, float]:
    """Return the medians of both sides in members per second, and the median of the pairs' ratios."""
    rates: list[tuple[float, float]] = []
    for _ in range(_PAIRS):
        pair = []
        for side in (ours, theirs):
            start = time.perf_counter()
            side(path)
            pair.append(num_members / (time.perf_counter() - start))
        rates.append((pair[0], pair[1]))
    own, peer = (statistics.median(column) for column in zip(*rates, strict=True))
    return own, peer, statistics.median(a / b for a, b in rates)


def _walk(path: Path) -> int:
    with TarReader(path) as reader:
        return sum(1 for _ in reader.members())


def _walk_with_tarfile(path: Path) -> int:
    with tarfile.open(path, "r:") as archive:
        return sum(1 for _ in archive)


def _index_with_tarfile(path: Path) -> list[tuple[str, int, int]]:
    rows = []
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            stream = archive.extractfile(member)
            assert stream is not None
            if member.name.endswith(".json"):
                length = sum(len(text) for text in json.load(stream).values())
            else:
                with Image.open(stream) as image:
                    image.getexif()
                    length = image.width * image.height
            rows.append((member.name, member.offset_data, length))
    return rows


if __name__ == "__main__":
    main()
