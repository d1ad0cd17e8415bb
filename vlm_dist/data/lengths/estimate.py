"""Costs from facts alone: sizes of texts, pictures and clips, as their headers tell them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlm_dist.config.vlm_collator import VideoProcessing
from vlm_dist.data.lengths.costs import Costs
from vlm_dist.data.types import Source
from vlm_dist.families import Family

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
        batch_keys: says which samples may share a micro-batch; None: all.
    """

    def __init__(self, sources: Sequence[Source], batch_keys: BatchKeys | None = None) -> None:
        self._sources = list(sources)
        self._batch_keys = batch_keys

    @property
    def digest(self) -> str:
        """The version of the estimate."""
        return LENGTH_ESTIMATE_VERSION

    @property
    def mixes_all(self) -> bool:
        """Whether any samples may share a micro-batch: all batch keys are 0."""
        return self._batch_keys is None or self._batch_keys.mixes_all

    def costs(self, source: int, rows: NDArray[np.int64]) -> Costs:
        """Estimate the costs of some rows."""
        facts = self._sources[source].facts(rows)
        tokens = estimate_num_tokens(facts)
        zeros = np.zeros_like(tokens)
        return Costs(tokens, zeros, zeros if self._batch_keys is None else self._batch_keys(facts))


class BatchKeys:
    """Which samples may share a micro-batch, from facts alone.

    Args:
        family: of the model.
        settings: how many frames are taken of a video.
    """

    def __init__(self, family: Family, settings: VideoProcessing) -> None:
        self._family = family
        self._settings = settings

    @property
    def mixes_all(self) -> bool:
        """Whether any samples may share a micro-batch."""
        return not self._family.equal_frames

    def __call__(self, facts: NDArray[np.void]) -> NDArray[np.int64]:
        """Give each row [N] its key: int64 [N]."""
        if self.mixes_all:
            return np.zeros(len(facts), dtype=np.int64)
        frames = sampled_frames(facts, self._settings, self._family.min_frames)
        return np.where(facts["num_videos"] > 0, frames, 0)


def sampled_frames(facts: NDArray[np.void], settings: VideoProcessing, min_frames: int = 1) -> NDArray[np.int64]:
    """Number of frames that are taken of each row's longest video: int64 [N]; the full number where it is unknown."""
    wanted = settings.frame_extraction.num_frames
    frames = facts["video_frames"].astype(np.int64)
    limit = settings.file_processing.max_duration
    if limit is not None:
        seconds = facts["video_seconds"].astype(np.float64)
        share = np.divide(limit, seconds, out=np.ones(len(facts)), where=seconds > 0)
        frames = np.minimum(frames, np.maximum(1, np.ceil(frames * share)).astype(np.int64))
    taken: NDArray[np.int64] = np.maximum(np.where(frames > 0, np.minimum(frames, wanted), wanted), min_frames)
    return taken


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
