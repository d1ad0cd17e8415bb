"""decord: seeks by counting frames from a key frame, which goes wrong where the frames' times are missing.

What it returns then are other frames than were asked for, without an error (seen in decord 0.6.0: h264 in avi, open
groups of pictures, MPEG-PS). There it reads from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.media.containers import has_leading_frames
from vlm_dist.data.media.video_readers import Frames, steady_rate
from vlm_dist.errors import SkipSample

_HEADER_BYTES = 1 << 20
_HEVC_MARKS = (b"V_MPEGH/ISO/HEVC", b"hvc1", b"hev1")


def open_video(path: str, container: str, *, rgb: bool) -> DecordReader:
    """Open a video with decord; its frames are always RGB."""
    return DecordReader(path, container)


class DecordReader:
    """A video in decord.

    Args:
        path: of the file.
        container: see `containers.container_of`.
    """

    def __init__(self, path: str, container: str) -> None:
        import decord

        if container == "mpegts":
            raise SkipSample("decode", "decord loses the first frames of MPEG transport streams; use library: pyav")
        decord.logging.set_level(decord.logging.QUIET)  # what is wrong with a sample goes to the quarantine file
        # one thread: decord keeps the frames of idle readers' threads, hundreds of MiB each
        self._reader: Any = decord.VideoReader(path, num_threads=1)
        self.num_frames = len(self._reader)
        self._starts, span = self._frame_times()
        self._may_seek = self._starts is not None and _can_seek(path, container)
        self.fps = steady_rate(self.num_frames, float(self._reader.get_avg_fps()), span)
        self._first: Frames | None = None
        self.size = self._header_size(path, container)

    def read(self, times: Sequence[float]) -> Frames:
        """See `VideoReader`."""
        half = 0.5 / self.fps
        if self._starts is not None:
            places = np.searchsorted(self._starts, np.asarray(times) + half, side="right") - 1
        else:
            places = np.rint(np.asarray(times) * self.fps)
        wanted = [int(place) for place in np.clip(places, 0, self.num_frames - 1)]
        if self._may_seek:
            frames: Frames = self._reader.get_batch(wanted).asnumpy()
            return frames
        return self._read_through(wanted)

    def close(self) -> None:
        """See `VideoReader`."""
        self._reader = None

    def _read_through(self, wanted: Sequence[int]) -> Frames:
        found: dict[int, Frames] = {} if self._first is None else {0: self._first}
        for number in range(len(found), wanted[-1] + 1):
            frame = self._reader.next().asnumpy()
            if number in wanted:
                found[number] = frame
        return np.stack([found[number] for number in wanted])

    def _frame_times(self) -> tuple[NDArray[np.float64] | None, float]:
        """When each frame begins, from 0 on, and how long all take; None where decord does not know."""
        times = np.asarray(self._reader.get_frame_timestamp(list(range(self.num_frames))), dtype=np.float64)
        if self.num_frames == 0 or not np.isfinite(times).all() or np.abs(times).max() > 1e7:
            return None, 0.0
        starts = times[:, 0] - times[0, 0]
        if (np.diff(starts) < 0).any():
            return None, 0.0
        return starts, float(times[-1, 1] - times[0, 0])

    def _header_size(self, path: str, container: str) -> tuple[int, int]:
        if container == "mp4":
            from vlm_dist.data.index.mp4_header import read_mp4_header

            with Path(path).open("rb") as stream:
                header = read_mp4_header(stream)
            if header is not None:
                return header.width, header.height
        if self.num_frames == 0:
            return 0, 0
        if self._may_seek:
            height, width = self._reader[0].shape[:2]
        else:
            self._first = self._reader.next().asnumpy()
            height, width = self._first.shape[:2]
        return int(width), int(height)


def _can_seek(path: str, container: str) -> bool:
    if container not in ("mp4", "matroska"):
        return False
    with Path(path).open("rb") as stream:
        leads = has_leading_frames(stream) if container == "mp4" else None
        if leads is not None:
            return not leads
        stream.seek(0)
        head = stream.read(_HEADER_BYTES)
    return not any(mark in head for mark in _HEVC_MARKS)  # HEVC's groups of pictures are open, mostly
