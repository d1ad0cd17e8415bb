"""Clips whose frames tell their numbers, in many containers and codecs."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import av
import numpy as np

WIDTH, HEIGHT = 160, 96
_BITS = 10
_CELL = WIDTH // _BITS

TURNS = {  # degrees clockwise -> matrix of a track's header
    90: (0, 1, 0, -1, 0, 0, HEIGHT, 0),
    180: (-1, 0, 0, 0, -1, 0, WIDTH, HEIGHT),
    270: (0, -1, 0, 1, 0, 0, 0, WIDTH),
}


def numbered_frame(number: int) -> np.ndarray:
    """Above, a cell per bit of the number; below, red on the left and blue on the right."""
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for bit in range(_BITS):
        frame[: HEIGHT // 2, bit * _CELL : (bit + 1) * _CELL] = 235 if number >> bit & 1 else 20
    frame[HEIGHT // 2 :, : WIDTH // 2] = (200, 40, 40)
    frame[HEIGHT // 2 :, WIDTH // 2 :] = (40, 40, 200)
    return frame


def number_of(frame: np.ndarray) -> int:
    cells = frame[8 : HEIGHT // 2 - 8].reshape(-1, _BITS, _CELL, 3)[:, :, 4:-4].mean((0, 2, 3))
    return sum(1 << bit for bit in range(_BITS) if cells[bit] > 128)


def clip(
    codec: str = "libx264",
    form: str = "mp4",
    num_frames: int = 120,
    fps: int = 30,
    times: Callable[[int], int] | None = None,
    **options: Any,
) -> bytes:
    """Encode a clip.

    Args:
        codec: of FFmpeg.
        form: container.
        num_frames: how many.
        fps: frames per second.
        times: number -> milliseconds, for frames that are not evenly spaced.
        options: of the codec.
    """
    defaults = {
        "libx264": {"preset": "veryfast", "crf": "16", "g": "30", "bf": "2"},
        "libx265": {
            "preset": "ultrafast",
            "crf": "16",
            "x265-params": "log-level=none:keyint=30:open-gop=1:pools=none",
        },
        "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "20"},
        "libsvtav1": {"preset": "12", "crf": "20", "svtav1-params": "lp=1"},
    }.get(codec, {"q:v": "2", "g": "30"})
    stream = io.BytesIO()
    # SVT-AV1 gives the thread that calls it real-time priority where it may, which all later processes would inherit
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    with av.open(stream, "w", format=form) as container:
        track = container.add_stream(codec, rate=fps, options={"threads": "1", **defaults, **options})
        track.width, track.height, track.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        if times is not None:
            track.time_base = track.codec_context.time_base = Fraction(1, 1000)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times(number), Fraction(1, 1000)
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    os.sched_setscheduler(0, policy, priority)
    return stream.getvalue()


def turned(data: bytes, degrees: int) -> bytes:
    """Write into an mp4 that its pictures are to be turned clockwise, as phones do."""
    a, b, u, c, d, v, x, y = TURNS[degrees]
    matrix = [a << 16, b << 16, u, c << 16, d << 16, v, x << 16, y << 16, 1 << 30]
    place = data.index(b"tkhd") + 4 + 40
    return data[:place] + struct.pack(">9i", *matrix) + data[place + 36 :]


def song() -> bytes:
    """An mp4 with sound alone."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return stream.getvalue()
