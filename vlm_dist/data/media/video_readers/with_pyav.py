"""PyAV: seeks by the time stamps of key frames, and checks by the time stamps of frames where it has come to."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vlm_dist.data.media.video_readers import Frames, steady_rate
from vlm_dist.errors import SkipSample

_Timed = tuple[float, Any]  # a frame, behind the tick of the stream's clock at which it is shown


def open_video(path: str, container: str, *, rgb: bool) -> PyavReader:
    """Open a video with PyAV; its frames are always RGB."""
    return PyavReader(path, container)


class PyavReader:
    """A video in PyAV.

    Args:
        path: of the file.
        container: see `containers.container_of`.
    """

    def __init__(self, path: str, container: str) -> None:
        self._path = path
        self._may_seek = container != "mpeg"  # its frames have other times after a seek
        self._container, self._stream = _open(path)
        self._frames: Iterator[_Timed] = iter(())
        self._start: float | None = None  # the tick of the first frame
        self._span = 0.0  # ticks from there to the end; 0: the header's rate is the number of frames by their time
        self._keys: list[float] = []  # ticks of the key frames, ascending
        self._shown: _Timed | None = None  # the frame before `_ahead`
        self._ahead: _Timed | None = None
        try:
            self._tick = float(self._stream.time_base)
            context = self._stream.codec_context
            self.size = (int(context.width), int(context.height))
            self._survey()
            self.fps = steady_rate(self.num_frames, float(self._stream.average_rate or 0), self._span * self._tick)
        except BaseException:
            self.close()
            raise

    def read(self, times: Sequence[float]) -> Frames:
        """See `VideoReader`."""
        self._begin(self._start or 0)
        if self._ahead is None:
            raise SkipSample("decode", "the video has no frames that can be decoded")
        if self._start is None:
            # the index has the ticks of decoding: frames are shown later, key frames all by the same number of ticks
            self._start = self._ahead[0]
            self._keys = [key - self._keys[0] + self._start for key in self._keys]
        return np.stack([self._picture(self._shown_at(time)) for time in times])

    def close(self) -> None:
        """See `VideoReader`."""
        self._frames = iter(())
        self._shown = self._ahead = None
        self._container.close()

    def _survey(self) -> None:
        """Learn where the key frames are, how many frames there are, and when the first and the last are shown.

        From the file's own index if it has a complete one (mp4, avi), else from its packets, which are not decoded.
        """
        entries = getattr(self._stream, "index_entries", None)
        if self._stream.frames > 1 and entries is not None and len(entries) >= self._stream.frames:
            kept = [entry for entry in entries if not entry.is_discard]
            self.num_frames = len(kept)
            self._keys = sorted(entry.timestamp for entry in kept if entry.is_keyframe)
            return
        times, keys, end = [], [], 0
        for packet in self._container.demux(self._stream):
            time = packet.pts if packet.pts is not None else packet.dts
            if time is None or packet.size == 0:
                continue
            times.append(time)
            end = max(end, time + (packet.duration or 0))
            if packet.is_keyframe:
                keys.append(time)
        self.num_frames = len(times)
        self._start = min(times, default=0)
        self._keys = sorted(keys) if self._may_seek else []
        last = max(times, default=0)
        average = (last - self._start) / (len(times) - 1) if len(times) > 1 else 0
        self._span = max(end, last + round(average)) - self._start
        self._container.close()
        self._container, self._stream = _open(self._path)

    def _shown_at(self, time: float) -> Any:
        """The last frame that begins before the middle of the frame that is due at `time`."""
        assert self._start is not None
        half = 0.5 / self.fps
        limit = self._start + (time + half) / self._tick
        key = bisect_right(self._keys, limit) - 1
        if self._ahead is not None and key >= 0 and self._keys[key] > self._ahead[0]:
            self._seek(int(limit))
        step = 1
        while not self._advance(limit):
            # the frames behind this key frame begin later than wanted: go back further
            key, step = key - step, 2 * step
            if key < 0:
                self._rewind()
                self._shown = self._ahead
                self._advance(limit)
                break
            self._seek(int(self._keys[key]))
        if self._shown is None:
            raise SkipSample("decode", "the video has no frames that can be decoded")
        if self._ahead is None:
            last = self._shown[0] + (self._shown[1].duration or 0)
            if limit > last + 2 / (self.fps * self._tick):
                raise SkipSample("decode", f"the video ends before second {time:.2f}, where a frame is wanted")
        return self._shown[1]

    def _advance(self, limit: float) -> bool:
        """Decode until the next frame begins after the limit; False if none begins before it."""
        while self._ahead is not None and self._ahead[0] <= limit:
            self._shown, self._ahead = self._ahead, next(self._frames, None)
        return self._shown is not None

    def _seek(self, key: int) -> None:
        self._container.seek(key, stream=self._stream, backward=True, any_frame=False)
        self._begin(key)

    def _rewind(self) -> None:
        self._container.close()
        self._container, self._stream = _open(self._path)
        self._begin(self._start or 0)

    def _begin(self, start: float) -> None:
        self._shown = None
        self._frames = self._timed(start)
        self._ahead = next(self._frames, None)

    def _timed(self, start: float) -> Iterator[_Timed]:
        """Decode; frames without a time (h264 in avi) are counted from where the decoding begins."""
        time = start
        for frame in self._container.decode(self._stream):
            if frame.pts is not None:
                time = frame.pts
            yield time, frame
            time += 1 / (self.fps * self._tick)

    def _picture(self, frame: Any) -> Frames:
        # one thread: starting one per core for each conversion takes ten times as long as the conversion
        picture: Frames = frame.to_ndarray(format="rgb24", threads=1)
        turns = round(getattr(frame, "rotation", 0) / 90) % 4
        return np.rot90(picture, turns) if turns else picture


def _open(path: str) -> tuple[Any, Any]:
    import av

    container = av.open(path, metadata_errors="replace")
    try:
        covers = getattr(getattr(av.stream, "Disposition", None), "attached_pic", 0)  # the picture of a song
        streams = [one for one in container.streams.video if not (covers and one.disposition & covers)]
        if not streams:
            raise SkipSample("decode", "the file has no video track")
        stream = streams[0]
        if stream.codec_context is None:
            raise SkipSample("decode", "the codec of the video track is not known to PyAV")
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
    except BaseException:
        container.close()
        raise
    return container, stream
