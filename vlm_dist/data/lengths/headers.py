"""The sizes that pictures and clips have when they have been decoded, told from their headers."""

from __future__ import annotations

import io
import math

from vlm_dist.config.vlm_collator import ImageProcessing, VideoProcessing
from vlm_dist.data.index.facts import probe_image
from vlm_dist.data.index.mp4_header import read_mp4_header
from vlm_dist.data.media.images import scaled_size

Size = tuple[int, int]  # width, height in pixels


def picture_size(data: bytes, settings: ImageProcessing) -> Size | None:
    """Tell which size `decode_image` gives a picture.

    Returns:
        None where only decoding tells.
    """
    size = probe_image(data)
    return None if size is None else resized_size(size, settings)


def resized_size(size: Size, settings: ImageProcessing) -> Size:
    """Tell which size `resize_image` gives a picture of this size."""
    if settings.max_size is None:
        return size
    if settings.resize_mode != "keep_aspect":
        return settings.max_size, settings.max_size
    longest = max(size)
    return size if longest <= settings.max_size else scaled_size(size, settings.max_size / longest)


def clip_shape(data: bytes, settings: VideoProcessing, min_frames: int) -> tuple[int, Size] | None:
    """Tell how many frames of which size `decode_video` gives.

    Only where the number of frames is beyond doubt: containers count frames in more than one way, but where there are
    clearly more than are wanted, just those are taken.

    Returns:
        None where only decoding tells.
    """
    header = read_mp4_header(io.BytesIO(data))
    if header is None:
        return None
    available = num_available_frames(header.num_frames, header.seconds, settings.file_processing.max_duration)
    wanted = settings.frame_extraction.num_frames
    if available < wanted + 2:
        return None
    return max(wanted, min_frames), (header.width, header.height)


def num_available_frames(num_frames: int, seconds: float, max_duration: float | None) -> int:
    """Frames of a video that are sampled from."""
    if max_duration is None or seconds <= 0:
        return num_frames
    return min(num_frames, max(1, math.ceil(max_duration * num_frames / seconds)))
