"""Media decoded as vlm_collator_config.yaml says."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_dist.config.vlm_collator import VlmCollatorConfig
from vlm_dist.data.media.images import Picture, decode_image
from vlm_dist.data.media.video import Clip, decode_video


def configured_image(data: bytes, config: VlmCollatorConfig) -> Picture:
    """Decode a picture; see `decode_image`."""
    settings = config.image_processing
    return decode_image(
        data, convert_to_rgb=settings.convert_to_rgb, resize_mode=settings.resize_mode, max_size=settings.max_size
    )


def configured_video(data: bytes, config: VlmCollatorConfig, libraries: Sequence[str]) -> Clip:
    """Decode frames of a video; see `decode_video`."""
    settings = config.video_processing
    return decode_video(
        data,
        num_frames=settings.frame_extraction.num_frames,
        max_duration=settings.file_processing.max_duration,
        libraries=libraries,
        convert_to_rgb=settings.file_processing.convert_to_rgb,
    )
