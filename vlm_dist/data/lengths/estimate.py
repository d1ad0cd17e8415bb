"""Costs from facts alone: sizes of texts, pictures and clips, as their headers tell them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlm_dist.data.lengths.costs import Costs
from vlm_dist.data.types import Source

# Only the order of these estimates matters to group_by_length.
BYTES_PER_TOKEN = 3.5
PIXELS_PER_TOKEN = 28 * 28
MAX_TOKENS_PER_IMAGE = 16_384
PLANNED_FRAMES = 8
_UNKNOWN_MEDIA_PIXELS = 448 * 448
LENGTH_ESTIMATE_VERSION = "facts-1"


class FactLengths:
    """Costs without a processor.

    Args:
        sources: of the run, in order.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = list(sources)

    @property
    def digest(self) -> str:
        """The version of the estimate."""
        return LENGTH_ESTIMATE_VERSION

    def costs(self, source: int, rows: NDArray[np.int64]) -> Costs:
        """Estimate the costs of some rows."""
        tokens = estimate_num_tokens(self._sources[source].facts(rows))
        zeros = np.zeros_like(tokens)
        return Costs(tokens, zeros, zeros)


def estimate_num_tokens(facts: NDArray[np.void]) -> NDArray[np.int64]:
    """Estimate the number of text and visual tokens from facts alone.

    Args:
        facts: [N] of FACTS_DTYPE.

    Returns:
        int64 [N], at least 1; grows with the text, with the pixels and with the frames.
    """
    num_images = facts["num_images"].astype(np.float64)
    image_pixels = facts["image_pixels"] + (facts["image_pixels"] == 0) * num_images * _UNKNOWN_MEDIA_PIXELS
    image_tokens = np.minimum(image_pixels / PIXELS_PER_TOKEN, num_images * MAX_TOKENS_PER_IMAGE)
    frame_pixels = facts["video_width"].astype(np.float64) * facts["video_height"]
    frame_pixels = np.where(frame_pixels > 0, frame_pixels, _UNKNOWN_MEDIA_PIXELS)
    frames = np.where(facts["video_frames"] > 0, np.minimum(facts["video_frames"], PLANNED_FRAMES), PLANNED_FRAMES)
    video_tokens = facts["num_videos"] * frames * frame_pixels / PIXELS_PER_TOKEN
    tokens = facts["text_bytes"] / BYTES_PER_TOKEN + image_tokens + video_tokens
    estimate: NDArray[np.int64] = np.maximum(tokens, 1.0).astype(np.int64)
    return estimate
