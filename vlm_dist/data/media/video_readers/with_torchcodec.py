"""torchcodec: scans the packets of the file, then seeks exactly; needs FFmpeg's shared libraries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from vlm_dist.data.media.video_readers import Frames, steady_rate
from vlm_dist.errors import SkipSample


@cache
def loading_problem() -> str | None:
    """Say why torchcodec is of no use here; None: it is."""
    try:
        from torchcodec.decoders import VideoDecoder  # type: ignore[attr-defined]

        VideoDecoder(b"no video")
    except ImportError as error:
        return f"torchcodec cannot be imported ({str(error).strip().splitlines()[0]})"
    except (RuntimeError, ValueError, OSError) as error:
        if "libtorchcodec" in str(error):
            return "torchcodec finds no FFmpeg that it can load"
    return None


def open_video(path: str, container: str, *, rgb: bool) -> TorchcodecReader:
    """Open a video with torchcodec; its frames are always RGB."""
    if container in ("mpeg", "mpegts"):
        raise SkipSample("decode", "torchcodec does not find the first frames of MPEG streams; use library: pyav")
    return TorchcodecReader(path)


class TorchcodecReader:
    """A video in torchcodec.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        from torchcodec.decoders import VideoDecoder  # type: ignore[attr-defined]

        self._decoder: Any = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        facts = self._decoder.metadata
        self.num_frames = int(facts.num_frames or 0)
        self.size = (int(facts.width or 0), int(facts.height or 0))
        self._begin = float(facts.begin_stream_seconds or 0)
        self._end = float(facts.end_stream_seconds or 0)
        self.fps = steady_rate(self.num_frames, float(facts.average_fps_from_header or 0), self._end - self._begin)

    def read(self, times: Sequence[float]) -> Frames:
        """See `VideoReader`."""
        latest = np.nextafter(self._end, self._begin)
        moments = np.minimum(self._begin + np.asarray(times) + 0.5 / self.fps, latest)
        frames: Frames = self._decoder.get_frames_played_at(moments.tolist()).data.numpy()
        return frames

    def close(self) -> None:
        """See `VideoReader`."""
        self._decoder = None
