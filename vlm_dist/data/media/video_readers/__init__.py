"""One module per video library, behind one interface; which of them a run uses."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from vlm_dist.errors import ConfigError

VideoLibrary = Literal["decord", "cv2", "pyav", "torchcodec", "auto"]

Frames = NDArray[np.uint8]  # [F, H, W, 3], upright


class VideoReader(Protocol):
    """An open video. Times are seconds since its first frame.

    Attributes:
        num_frames: of the whole video.
        fps: frames per second, so that num_frames / fps is the duration; 0 where nobody knows.
        size: (width, height) of a frame in pixels, before any frame has been decoded; of an upright frame or a
            lying one.
    """

    num_frames: int
    fps: float
    size: tuple[int, int]

    def read(self, times: Sequence[float]) -> Frames:
        """Decode the frames that are shown at ascending times.

        Raises:
            SkipSample: the video ends before the last of them.
        """

    def close(self) -> None:
        """Give back all memory and files."""


class OpenVideo(Protocol):
    """Opens a video; any error that the library has for that may come out."""

    def __call__(self, path: str, container: str, *, rgb: bool) -> VideoReader:
        """Open the video.

        Args:
            path: of the file.
            container: see `containers.container_of`.
            rgb: False leaves the colours in the library's own order.
        """


@dataclass(frozen=True)
class _Library:
    module: str
    distribution: str
    fix: str


_LIBRARIES = {
    "pyav": _Library("av", "av", "pip install av"),
    "torchcodec": _Library(
        "torchcodec", "torchcodec", "pip install torchcodec, and install FFmpeg's shared libraries (apt install ffmpeg)"
    ),
    "decord": _Library("decord", "decord", "pip install decord"),
    "cv2": _Library("cv2", "opencv-python-headless", "pip install opencv-python-headless"),
}

#: What `auto` tries, in this order. PyAV first: it brings an FFmpeg of today, reads AV1, and seeks by the time stamps
#: of the packets. decord knows no AV1 and reads several containers from the start; OpenCV guesses where frames are.
AUTO_ORDER = tuple(_LIBRARIES)


def libraries_for(library: str) -> tuple[str, ...]:
    """Say which libraries read the videos of a run, in the order in which they are tried.

    Raises:
        ConfigError: the chosen one is not installed or cannot be loaded; for "auto": none is.
    """
    if library != "auto":
        problem = _problem(library)
        if problem is not None:
            raise ConfigError(
                f"video_processing.frame_extraction.library is {library}, but {problem}; {_LIBRARIES[library].fix}"
            )
        return (library,)
    usable = tuple(filter(is_usable, AUTO_ORDER))
    if not usable:
        raise ConfigError(
            "video_processing.frame_extraction.library is auto, but no library for videos is installed; "
            + _LIBRARIES["pyav"].fix
        )
    return usable


def is_usable(name: str) -> bool:
    """Whether a library can be loaded here."""
    return _problem(name) is None


def describe(names: Sequence[str]) -> str:
    """Names with versions, for a line in the log."""
    return ", ".join(f"{name} {_version(_LIBRARIES[name].distribution)}" for name in names)


def opener(name: str) -> OpenVideo:
    """Load a library's module."""
    open_video: OpenVideo = importlib.import_module(f"{__name__}.with_{name}").open_video
    return open_video


def steady_rate(num_frames: int, claimed: float, span_seconds: float) -> float:
    """Frames per second, so that all frames fill the time that they were seen to take.

    What a header claims is taken where it agrees, to within a frame and a half: it is the rounder number.
    """
    if not (np.isfinite(claimed) and claimed > 0):
        claimed = 0.0
    if span_seconds <= 0 or num_frames < 1:
        return claimed
    if claimed and abs(num_frames / claimed - span_seconds) <= max(1.5 / claimed, 0.002 * span_seconds):
        return claimed
    return num_frames / span_seconds


def _problem(name: str) -> str | None:
    """Say why a library cannot be used; None: it can."""
    library = _LIBRARIES[name]
    if importlib.util.find_spec(library.module) is None:
        return f"{library.distribution} is not installed"
    if name == "torchcodec":
        return importlib.import_module(f"{__name__}.with_torchcodec").loading_problem()  # type: ignore[no-any-return]
    return None


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of unknown version"
