"""Thumbnails of samples, made by a process of its own: what is shown here is often what a decoder has died of."""

from __future__ import annotations

import base64
import json
import logging
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_dist.report.run_files import RunRecord

log = logging.getLogger(__name__)

#: For one sample, and for the opening of its source before it.
SAMPLE_SECONDS = 10.0
#: For all samples of a run.
RUN_SECONDS = 60.0
#: The process is started anew so often.
_MAX_STARTS = 6
_MODULE = "vlm_dist.report.picture_process"
_MAX_PICTURE_BYTES = 200_000
_MAX_LINE_BYTES = 2**21


@dataclass(frozen=True)
class Wanted:
    """A sample whose pictures are wanted.

    Attributes:
        run: number of the run.
        purpose: train or eval.
        source: name of its source.
        shard: file that it lies in.
        key: its name there.
    """

    run: int
    purpose: str
    source: str
    shard: str
    key: str


@dataclass(frozen=True)
class Shots:
    """Pictures of a sample.

    Attributes:
        pictures: JPEGs: of an image one, of a video a few frames.
        note: why there is none, or what is wrong with them.
    """

    pictures: tuple[bytes, ...] = ()
    note: str = ""


def take_pictures(run: RunRecord, number: int, wanted: Sequence[Wanted]) -> dict[Wanted, Shots]:
    """Read and decode pictures of samples, as far as they can be.

    Args:
        run: whose configuration says where the data lies.
        number: of the run.
        wanted: samples of this run.
    """
    data = run.config.get("data")
    if not wanted or not isinstance(data, dict):
        return {}
    place = next((life["working_directory"] for life in reversed(run.lives) if life.get("working_directory")), None)
    task = {"data": data, "directory": place if isinstance(place, str) else None}
    shots: dict[Wanted, Shots] = {}
    left, ends = list(wanted), time.monotonic() + RUN_SECONDS
    for _ in range(_MAX_STARTS):
        if not left or time.monotonic() > ends:
            break
        found = _ask({**task, "wanted": [vars(one) for one in left]}, len(left), ends)
        shots |= dict(zip(left, found, strict=False))
        left = left[len(found) :]
    return shots | dict.fromkeys(left, Shots(note="not looked at: the pictures before took too long"))


def _ask(task: dict[str, Any], count: int, ends: float) -> list[Shots]:
    """Shots of the first samples, up to and with the one that ended the process; of all where none did."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    root = str(Path(__file__).resolve().parent.parent.parent)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-m", _MODULE]
    try:
        process = subprocess.Popen(  # noqa: S603 - our own module
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=variables
        )
    except OSError as error:
        return [Shots(note=f"no process could be started to decode it: {error.strerror}")] * count
    assert process.stdin is not None and process.stdout is not None
    found: list[Shots] = []
    try:
        try:
            process.stdin.write(json.dumps(task, default=str).encode())
            process.stdin.close()
        except OSError:  # it has died at once
            log.debug("the process that decodes pictures has ended early")
        for line in _lines(process.stdout.fileno(), ends):
            found.append(_shots(line))
            if len(found) == count:
                return found
    except TimeoutError:
        found.append(Shots(note="decoding took too long and was ended"))
        return found
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    return [*found, Shots(note="its decoder ended the process")]


def _lines(descriptor: int, ends: float) -> Any:
    """Lines of a pipe.

    Raises:
        TimeoutError: one takes too long to come.
    """
    os.set_blocking(descriptor, False)
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        deadline = min(time.monotonic() + 2 * SAMPLE_SECONDS, ends)
        while len(rest) < _MAX_LINE_BYTES:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            part = os.read(descriptor, 2**16)
            if not part:
                return
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                yield line
                deadline = min(time.monotonic() + SAMPLE_SECONDS, ends)


def _shots(line: bytes) -> Shots:
    try:
        answer = json.loads(line)
        pictures = [base64.b64decode(one, validate=True) for one in answer["pictures"]]
        shots = Shots(tuple(one for one in pictures if _is_jpeg(one)), str(answer["note"])[:500])
    except (ValueError, KeyError, TypeError):
        return Shots(note="its decoder gave nonsense back")
    return shots if len(shots.pictures) == len(pictures) else replace(shots, note="its pictures are too large")


def _is_jpeg(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8\xff") and len(data) <= _MAX_PICTURE_BYTES
