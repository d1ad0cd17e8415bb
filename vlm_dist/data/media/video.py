"""Videos: a few frames, spread evenly, sought in the file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm_dist.data.media.images import scaled_size
from vlm_dist.errors import DataError, SkipSample


@dataclass(frozen=True, slots=True)
class Clip:
    """Frames of a video, and where they lie in it.

    Attributes:
        frames: [F, H, W, 3] uint8, RGB.
        indices: the frames' numbers in the video, ascending.
        fps: frames per second of the video.
        num_frames: frames that were sampled from: of the whole video, or of its first `max_duration` seconds.
    """

    frames: NDArray[np.uint8]
    indices: tuple[int, ...]
    fps: float
    num_frames: int

    @property
    def metadata(self) -> dict[str, Any]:
        """As processors take it: which frames of what these are."""
        return {
            "fps": self.fps,
            "total_num_frames": self.num_frames,
            "frames_indices": list(self.indices),
            "duration": self.num_frames / self.fps,
            "height": int(self.frames.shape[1]),
            "width": int(self.frames.shape[2]),
        }


def sample_indices(num_available: int, num_frames: int) -> list[int]:
    """Spread `num_frames` evenly over a video, each at the start of its share; never one frame twice.

    The same rule as the video processors of transformers have.
    """
    count = min(num_available, num_frames)
    return [i * num_available // count for i in range(count)]


def decode_video(source: bytes | Path, *, num_frames: int, max_duration: float | None = None) -> Clip:
    """Decode evenly spread frames of a video.

    A video with fewer frames than `num_frames` gives all that it has. Of a video longer than `max_duration` only the
    first so many seconds are looked at.

    Args:
        source: an encoded video, or the file that holds one.
        num_frames: how many frames.
        max_duration: seconds; None: no limit.

    Raises:
        SkipSample: ("decode") it cannot be opened, has no frames, or is damaged where a frame is wanted.
        DataError: decord is not installed.
    """
    try:
        import decord
    except ImportError as error:
        raise DataError("videos need decord: pip install decord") from error
    with _as_path(source) as path:
        try:
            # one thread: decord keeps the frames of idle readers' threads, hundreds of MiB each
            reader = decord.VideoReader(path, num_threads=1)
            num_available = len(reader)
            fps = float(reader.get_avg_fps())
            if not (math.isfinite(fps) and fps > 0):
                fps = 25.0  # the container does not say; only times depend on it
            if max_duration is not None:
                num_available = min(num_available, max(1, math.ceil(max_duration * fps)))
            if num_available < 1:
                raise SkipSample("decode", "the video has no frames")
            indices = sample_indices(num_available, num_frames)
            frames = reader.get_batch(indices).asnumpy()
            del reader  # closed at once: an idle reader keeps its buffers
        except (RuntimeError, OSError, IndexError, ValueError, decord.DECORDError) as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise SkipSample("decode", f"cannot decode the video: {type(error).__name__}: {first_line}") from error
    return Clip(frames=frames, indices=tuple(indices), fps=fps, num_frames=num_available)


@contextmanager
def _as_path(source: bytes | Path) -> Iterator[str]:
    """Give decord a path: a truncated mp4 read through a Python object kills the process, through a file it raises."""
    if not isinstance(source, bytes):
        yield str(source)
        return
    descriptor = os.memfd_create("vlm-dist-video")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as target:
            target.write(source)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def blank_clip(num_frames: int, width: int, height: int) -> Clip:
    """Make a black clip of one second."""
    frames = np.zeros((num_frames, height, width, 3), dtype=np.uint8)
    return Clip(frames, tuple(range(num_frames)), float(num_frames), num_frames)


def keep_frames(clip: Clip, num_frames: int) -> Clip:
    """Thin a clip out to `num_frames`, evenly; a clip that has no more is returned as it is."""
    if num_frames >= len(clip.indices):
        return clip
    chosen = sample_indices(len(clip.indices), num_frames)
    return replace(clip, frames=clip.frames[chosen], indices=tuple(clip.indices[i] for i in chosen))


def repeat_last_frame(clip: Clip, min_frames: int) -> Clip:
    """Lengthen a clip below what its family needs."""
    missing = min_frames - len(clip.indices)
    if missing <= 0:
        return clip
    frames = np.concatenate([clip.frames, np.repeat(clip.frames[-1:], missing, axis=0)])
    return replace(clip, frames=frames, indices=clip.indices + clip.indices[-1:] * missing)


def scale_clip(clip: Clip, factor: float) -> Clip:
    """Scale all frames by a factor; 1 returns the clip as it is."""
    height, width = clip.frames.shape[1:3]
    size = scaled_size((width, height), factor)
    if size == (width, height):
        return clip
    frames = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in clip.frames]
    return replace(clip, frames=np.stack(frames))
