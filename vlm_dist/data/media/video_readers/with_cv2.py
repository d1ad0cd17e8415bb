"""OpenCV: seeks to where a frame should be at a constant rate; the times of the frames say whether it is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_dist.data.media.video_readers import Frames, steady_rate
from vlm_dist.errors import SkipSample

#: OpenCV begins at a key frame after each seek; over a way shorter than the usual distance of key frames going on is
#: cheaper: 8 frames of 10 s take a fifth of the time with one key frame in 250, and no longer with one in 30.
_SHORT_WAY_FRAMES = 64


def open_video(path: str, container: str, *, rgb: bool) -> Cv2Reader:
    """Open a video with OpenCV; its own order of colours is blue, green, red."""
    return Cv2Reader(path, rgb)


class Cv2Reader:
    """A video in OpenCV.

    Args:
        path: of the file.
        rgb: False: leave the frames in OpenCV's order, BGR.
    """

    def __init__(self, path: str, rgb: bool) -> None:
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what is wrong with a sample goes to the quarantine file
        import cv2

        self._cv2 = cv2
        self._path = path
        self._rgb = rgb
        self._capture = self._open()
        self.num_frames = int(self._get(cv2.CAP_PROP_FRAME_COUNT))
        self.fps = steady_rate(self.num_frames, float(self._get(cv2.CAP_PROP_FPS)), 0.0)
        self.size = (int(self._get(cv2.CAP_PROP_FRAME_WIDTH)), int(self._get(cv2.CAP_PROP_FRAME_HEIGHT)))
        self._start: float | None = None  # seconds; streams need not begin at 0

    def read(self, times: Sequence[float]) -> Frames:
        """See `VideoReader`."""
        if not self._capture.grab():
            raise SkipSample("decode", "OpenCV cannot decode the first frame of the video")
        self._start = self._seconds()
        frames = []
        for time in times:
            frame = self._shown_at(time)
            frames.append(self._cv2.cvtColor(frame, self._cv2.COLOR_BGR2RGB) if self._rgb else frame)
        return np.stack(frames)

    def close(self) -> None:
        """See `VideoReader`."""
        self._capture.release()

    def _shown_at(self, time: float) -> Any:
        """The last frame that begins before the middle of the frame that is due at `time`."""
        half = 0.5 / self.fps
        if time - self._elapsed() <= _SHORT_WAY_FRAMES / self.fps:
            frame = self._go_on_to(time, half)
            if frame is not None:
                return frame
        number, back = round(time * self.fps), 0
        while True:
            if number - back > 0:
                self._capture.set(self._cv2.CAP_PROP_POS_FRAMES, number - back)
            else:
                self._capture.release()
                self._capture = self._open()  # a seek to the first frame misses it in some containers
            found = self._capture.grab()
            if found and self._elapsed() <= time + half:
                break
            if number - back <= 0:
                raise SkipSample("decode", "OpenCV cannot find the first frame of the video again")
            back = 2 * back + 1
        frame = self._retrieve()
        if self._elapsed() >= time - half:
            return frame
        while True:  # it has landed earlier than asked: the frames are not evenly spaced
            last = self._elapsed()
            if not self._capture.grab():
                if time > last + 2 / self.fps:
                    raise SkipSample("decode", f"the video ends before second {time:.2f}, where a frame is wanted")
                return frame
            if self._elapsed() > time + half:
                return frame
            frame = self._retrieve()

    def _go_on_to(self, time: float, half: float) -> Any:
        """Decode until a frame is due; None where none is due then, or the video ends."""
        while self._elapsed() < time - half:
            if not self._capture.grab():
                return None
        return self._retrieve() if self._elapsed() <= time + half else None

    def _retrieve(self) -> Any:
        decoded, frame = self._capture.retrieve()
        if not decoded or frame is None:
            raise SkipSample("decode", "OpenCV cannot decode a frame of the video")
        return frame

    def _elapsed(self) -> float:
        return self._seconds() - (self._start or 0.0)

    def _seconds(self) -> float:
        return float(self._get(self._cv2.CAP_PROP_POS_MSEC)) / 1000

    def _get(self, name: int) -> Any:
        return self._capture.get(name)

    def _open(self) -> Any:
        # the library's own threads would compete with the other workers
        capture = self._cv2.VideoCapture(self._path, self._cv2.CAP_FFMPEG, [self._cv2.CAP_PROP_N_THREADS, 1])
        if not capture.isOpened():
            raise SkipSample("decode", "OpenCV cannot open the video")
        return capture
