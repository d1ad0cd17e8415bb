"""Costs from facts, by the rules of the model's own processor: what there is where nobody has counted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlm_dist.config.vlm_collator import VlmCollatorConfig
from vlm_dist.data.lengths.calibration import TextCalibration, text_tokens
from vlm_dist.data.lengths.costs import Costs
from vlm_dist.data.lengths.estimate import BatchKeys, sampled_frames
from vlm_dist.data.lengths.headers import Size, resized_size
from vlm_dist.data.types import Source
from vlm_dist.families import Family

ESTIMATE_VERSION = 2

_UNKNOWN_SIDE = 448  # pixels; where a header could not be read
_SMALLEST_SIDE = 28  # pixels; media are not made smaller than that
#: Sides are rounded to so many binary digits, so that few sizes stand for millions: 0.8% of a side where the processor
#: estimates, 12% where each size costs a blank picture put through it.
_DIGITS, _DIGITS_MEASURED = 7, 3
_SIDE_BITS = 20


class CountsVisual(Protocol):
    """Tells how many tokens media of given sizes become; `encoding.fit.VisualCounter` is one."""

    kinds: frozenset[str]  # that are read: "image", "video"
    estimated: frozenset[str]  # of which the processor tells without a picture

    def count_many(self, kind: str, shapes: Sequence[tuple[int, Size]]) -> list[int]:
        """Count the tokens of each image (frames 1) or clip."""


class ProcessorLengths:
    """Costs as the processor would count them, but for the text, whose length is estimated from its bytes.

    A cost depends on its own row alone, so that it is the same whatever it is asked for with.

    Args:
        sources: of the run, in order.
        calibrations: one per source.
        counter: of the processor.
        family: of the model.
        config: from columns to tokens.
        fingerprint: of all that the counter depends on.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        calibrations: Sequence[TextCalibration],
        counter: CountsVisual,
        family: Family,
        config: VlmCollatorConfig,
        fingerprint: str,
    ) -> None:
        self._sources = list(sources)
        self._calibrations = list(calibrations)
        self._counter = counter
        self._family = family
        self._config = config
        self._fingerprint = fingerprint
        self._batch_keys = BatchKeys(family, config.video_processing)
        self._known: dict[tuple[str, int], int] = {}  # (kind, shape as one number) -> tokens of one image or clip
        self._smallest = {
            "image": self._count("image", np.asarray([_key(1, _SMALLEST_SIDE, _SMALLEST_SIDE)]))[0],
            "video": self._count("video", np.asarray([_key(family.frame_step, _SMALLEST_SIDE, _SMALLEST_SIDE)]))[0],
        }

    @property
    def digest(self) -> str:
        """`estimate:` and a hex digest."""
        facts = [ESTIMATE_VERSION, self._fingerprint, [astuple(one) for one in self._calibrations]]
        return "estimate:" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]

    @property
    def mixes_all(self) -> bool:
        """Whether any samples may share a micro-batch: all batch keys are 0."""
        return self._batch_keys.mixes_all

    def costs(self, source: int, rows: NDArray[np.int64]) -> Costs:
        """Estimate the costs of some rows: about a microsecond each, once the sizes of media are known."""
        facts = self._sources[source].facts(rows)
        text = text_tokens(self._calibrations[source], facts["text_bytes"])
        visual, smallest = self._image_tokens(facts)
        video, smallest_video = self._video_tokens(facts)
        visual, smallest = visual + video, smallest + smallest_video
        limit = self._config.text_processing.max_length
        if self._config.text_processing.truncation:
            room = limit - text
            visual = np.minimum(visual, np.where(room >= smallest, room, limit // 2))
        tokens = np.clip(text + visual, 1, limit)
        return Costs(tokens, visual * self._family.patches_per_token, self._batch_keys(facts))

    def _image_tokens(self, facts: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens of each row's images, and of their smallest form: two int64 [N]."""
        num = facts["num_images"].astype(np.int64) * ("image" in self._counter.kinds)
        width, height = (_known_side(facts[name]) for name in ("image_width", "image_height"))
        tokens = np.where(num > 0, self._count("image", _key(1, width, height), num > 0), 0) * num
        if self._family.follows_resolution:
            # the facts know the largest image and the sum of all: the others cost as their pixels do
            share = np.clip(facts["image_pixels"] / (width * height * np.maximum(num, 1)), 0, 1)
            share = np.where((num > 1) & (facts["image_pixels"] > 0), share, 1.0)
            tokens = np.maximum(np.ceil(tokens * share).astype(np.int64), num)
            return tokens, np.minimum(tokens, num * self._smallest["image"])
        return tokens, tokens

    def _video_tokens(self, facts: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The same for videos."""
        num = facts["num_videos"].astype(np.int64) * ("video" in self._counter.kinds)
        width, height = (_known_side(facts[name]) for name in ("video_width", "video_height"))
        frames = sampled_frames(facts, self._config.video_processing, self._family.min_frames)
        tokens = np.where(num > 0, self._count("video", _key(frames, width, height), num > 0), 0) * num
        smallest = num * self._smallest["video"] if self._family.follows_resolution else tokens
        return tokens, np.minimum(tokens, smallest)

    def _count(self, kind: str, keys: NDArray[np.int64], wanted: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """Count the tokens of one image or clip per row: int64 [N]; 0 where it is not wanted."""
        counts = np.zeros(len(keys), dtype=np.int64)
        if kind not in self._counter.kinds:
            return counts
        chosen = np.ones(len(keys), dtype=bool) if wanted is None else wanted
        if not chosen.any():
            return counts
        distinct, inverse = np.unique(self._rounded(kind, keys[chosen]), return_inverse=True)
        names = distinct.tolist()
        missing = [name for name in names if (kind, name) not in self._known]
        if missing:
            shapes = [_shape(name) for name in missing]
            if kind == "image":
                shapes = [(frames, resized_size(size, self._config.image_processing)) for frames, size in shapes]
            for name, count in zip(missing, self._counter.count_many(kind, shapes), strict=True):
                self._known[kind, name] = count
        counts[chosen] = np.asarray([self._known[kind, name] for name in names], dtype=np.int64)[inverse]
        return counts

    def _rounded(self, kind: str, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        digits = _DIGITS if kind in self._counter.estimated else _DIGITS_MEASURED
        mask = (1 << _SIDE_BITS) - 1
        width, height = keys >> _SIDE_BITS & mask, keys & mask
        return _key(keys >> 2 * _SIDE_BITS, _round_side(width, digits), _round_side(height, digits))


def _known_side(sides: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.clip(np.where(sides > 0, sides, _UNKNOWN_SIDE), 1, (1 << _SIDE_BITS) - 1).astype(np.int64)


def _round_side(sides: NDArray[np.int64], digits: int) -> NDArray[np.int64]:
    """Keep the first binary digits of each, to the nearest."""
    exponents = np.frexp(sides.astype(np.float64))[1].astype(np.int64)  # sides < 2 ** exponent
    unit = np.left_shift(np.int64(1), np.maximum(exponents - digits, 0))
    rounded: NDArray[np.int64] = np.minimum((sides + unit // 2) // unit * unit, (1 << _SIDE_BITS) - 1)
    return rounded


def _key(frames: Any, width: Any, height: Any) -> NDArray[np.int64]:
    """Write shapes as one number each, so that equal ones are found fast."""
    frames, width, height = (np.asarray(one, dtype=np.int64) for one in (frames, width, height))
    key: NDArray[np.int64] = frames << 2 * _SIDE_BITS | width << _SIDE_BITS | height
    return key


def _shape(key: int) -> tuple[int, Size]:
    mask = (1 << _SIDE_BITS) - 1
    return key >> 2 * _SIDE_BITS, (key >> _SIDE_BITS & mask, key & mask)
