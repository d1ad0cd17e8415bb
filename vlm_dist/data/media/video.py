"""Videos: a few frames, spread evenly, sought in the file."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm_dist.data.media.containers import HEAD_BYTES, container_of
from vlm_dist.data.media.images import scaled_size
from vlm_dist.data.media.named import naming
from vlm_dist.data.media.video_readers import VideoReader, is_usable, opener
from vlm_dist.errors import DataError, SkipSample

#: A frame above this, 8192 x 8192, is an error of the data, or an attack.
MAX_FRAME_PIXELS = 2**26
#: Of all frames that are taken from a video: 1.6 GB of RGB, or 64 frames of 4K.
MAX_CLIP_PIXELS = 2**29


_PLACE_IN_DECORD = re.compile(r"^\[\d\d:\d\d:\d\d\] \S+:\d+: ")  # time, file and line of its C++ source


@dataclass(frozen=True, slots=True)
class Clip:
    """Frames of a video, and where they lie in it.

    Attributes:
        frames: [F, H, W, 3] uint8, RGB (or as `convert_to_rgb` False leaves them).
        indices: the frames' numbers in the video, ascending.
        fps: frames per second of the video, on the average.
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


def decode_video(
    data: bytes,
    *,
    num_frames: int,
    max_duration: float | None = None,
    libraries: Sequence[str] = ("decord",),
    convert_to_rgb: bool = True,
) -> Clip:
    """Decode frames of a video at evenly spread times, upright.

    Frame i of a video of n frames is the one that is shown at i / fps seconds, with fps = n / duration; so what the
    metadata says about times holds where frames are not evenly spaced, and no library needs to know more than times.

    A video with fewer frames than `num_frames` gives all that it has. Of a video longer than `max_duration` only the
    first so many seconds are looked at.

    Args:
        data: an encoded video.
        num_frames: how many frames.
        max_duration: seconds; None: no limit.
        libraries: that read it, see `video_readers`; the next is tried where one cannot open the video.
        convert_to_rgb: False leaves the colours in the library's own order: cv2 gives BGR, the others RGB.

    Raises:
        SkipSample: ("decode") it cannot be opened, has no frames or too large ones, or is damaged where a frame is
            wanted.
        DataError: a library is not installed.
    """
    with naming(data), _as_path(data) as path:
        reader = open_reader(path, libraries, rgb=convert_to_rgb)
        try:
            if reader.num_frames < 1:
                raise SkipSample("decode", "the video has no frames")
            if reader.fps <= 0:
                reader.fps = 25.0  # the container does not say; only times depend on it
            num_available = reader.num_frames
            if max_duration is not None:
                num_available = min(num_available, max(1, math.ceil(max_duration * reader.fps)))
            indices = sample_indices(num_available, num_frames)
            _check_pixels(reader.size, len(indices))
            frames = reader.read([index / reader.fps for index in indices])
            fps = reader.fps
        except SkipSample:
            raise
        except Exception as error:
            raise SkipSample("decode", f"cannot decode the video: {_in_a_line(error)}") from error
        finally:
            reader.close()  # at once: an idle reader keeps its buffers
    return Clip(frames=frames, indices=tuple(indices), fps=fps, num_frames=num_available)


def open_reader(path: str, libraries: Sequence[str], *, rgb: bool = True) -> VideoReader:
    """Open a video with the first library that can; whoever opens it closes it.

    Raises:
        SkipSample: ("decode") it is no video, or none of them can open it.
        DataError: a library is not installed.
    """
    with Path(path).open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    if not head:
        raise SkipSample("decode", "the video is empty: it has 0 bytes")
    container = container_of(head)
    if container is None:
        raise SkipSample("decode", "the file is no video of a known kind")
    problems = []
    for library in libraries:
        try:
            return opener(library)(path, container, rgb=rgb)
        except ImportError as error:
            raise DataError(f"videos need {library}, which cannot be imported here: {error}") from error
        except SkipSample as skip:
            problems.append(f"{library}: {skip.message}")
        except Exception as error:  # noqa: BLE001 - each library has errors of its own
            problems.append(f"{library}: {_in_a_line(error)}")
    raise SkipSample("decode", f"cannot open the video: {'; '.join(problems)}{_way_out(path, container, libraries)}")


def _way_out(path: str, container: str, tried: Sequence[str]) -> str:
    """Name a library that is installed and opens the video: decord knows no AV1, for one; empty where there is none."""
    for library in ("pyav", "decord", "cv2"):  # torchcodec takes a second to load
        if library in tried or not is_usable(library):
            continue
        try:
            opener(library)(path, container, rgb=True).close()
        except Exception:  # noqa: BLE001, S112 - one more that cannot
            continue
        return (
            f". {library}, which is installed, opens it: set video_processing.frame_extraction.library to auto, or to "
            f"{library}"
        )
    return ""


def _check_pixels(size: tuple[int, int], num_frames: int) -> None:
    width, height = size
    if width * height > MAX_FRAME_PIXELS:
        raise SkipSample(
            "decode", f"the video's frames have {width} x {height} pixels; the limit is {MAX_FRAME_PIXELS}"
        )
    if width * height * num_frames > MAX_CLIP_PIXELS:
        raise SkipSample(
            "decode", f"{num_frames} frames of {width} x {height} pixels are more than {MAX_CLIP_PIXELS} pixels"
        )


def _in_a_line(error: Exception) -> str:
    lines = _PLACE_IN_DECORD.sub("", str(error).strip()).splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


@contextmanager
def _as_path(data: bytes) -> Iterator[str]:
    """Give libraries a path: decord dies of a truncated mp4 read through a Python object, through a file it raises."""
    descriptor = os.memfd_create("vlm-dist-video")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as target:
            target.write(data)
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
