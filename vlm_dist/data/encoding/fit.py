"""Makes pictures smaller, then clips shorter, until a sample fits its number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from vlm_dist.data.encoding.encode import Encoder
from vlm_dist.data.encoding.labels import RenderedText
from vlm_dist.data.media.images import scale_image, scaled_size
from vlm_dist.data.media.video import Clip, blank_clip, keep_frames, scale_clip
from vlm_dist.families import Family

#: Two neighbouring scales differ by 2^(1/16), 4% of a side: what is given away of a budget is below a tenth.
_STEPS_PER_HALVING = 16
#: No side is made longer than this by the smallest scale; processors enlarge what is below their own minimum.
_SMALLEST_LONG_SIDE = 28

Size = tuple[int, int]  # width, height in pixels


class VisualCounter:
    """Number of tokens that images and clips of given sizes become.

    Processors can tell it from the sizes, mostly; where one cannot, or is wrong about a blank picture, blank pictures
    are measured.

    Args:
        encoder: calls the processor.
        processor: may estimate.
        markers: kind -> what a text has in the place of one image or video.
    """

    def __init__(self, encoder: Encoder, processor: Any, markers: Mapping[str, str]) -> None:
        self._encoder = encoder
        self._processor = processor
        self._markers = markers
        self._measured: dict[tuple[int, int, int], int] = {}
        probes = {"image": (1, 200, 120), "video": (4, 200, 120)}
        self._trusted = {
            kind: self._estimate(kind, *probes[kind]) == self._measure(kind, *probes[kind]) for kind in markers
        }

    def count(self, kind: str, frames: int, size: Size) -> int:
        """Count the tokens of one image (`frames` 1) or clip."""
        if self._trusted.get(kind):
            estimate = self._estimate(kind, frames, *size)
            if estimate is not None:
                return estimate
        return self._measure(kind, frames, *size)

    def _estimate(self, kind: str, frames: int, width: int, height: int) -> int | None:
        estimator = getattr(self._processor, "_get_num_multimodal_tokens", None)
        if estimator is None:
            return None
        sizes = {"image_sizes": [(height, width)]} if kind == "image" else {"video_sizes": [(frames, height, width)]}
        try:
            return int(estimator(**sizes)[f"num_{kind}_tokens"][0])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            return None

    def _measure(self, kind: str, frames: int, width: int, height: int) -> int:
        key = (frames if kind == "video" else 0, width, height)
        if key not in self._measured:
            rendered = RenderedText(self._markers[kind])
            if kind == "image":
                encoded = self._encoder.encode(rendered, images=[Image.new("RGB", (width, height))])
            else:
                encoded = self._encoder.encode(rendered, clips=[blank_clip(frames, width, height)])
            self._measured[key] = int(encoded.is_visual.sum())
        return self._measured[key]


class Fitter:
    """Finds the largest form of a sample's media that fits.

    Args:
        counter: predicts tokens.
        family: says what can be made smaller.
    """

    def __init__(self, counter: VisualCounter, family: Family) -> None:
        self._counter = counter
        self._family = family

    def count(self, images: Sequence[Image.Image], clips: Sequence[Clip]) -> int:
        """Predict the visual tokens of a sample."""
        return self._count_scaled(images, clips, 1.0)

    def smallest(self, images: Sequence[Image.Image], clips: Sequence[Clip]) -> int:
        """Predict the visual tokens of a sample's smallest form."""
        scale = self._scale(self._num_scales(images, clips))
        return self._count_scaled(images, [keep_frames(clip, self._family.frame_step) for clip in clips], scale)

    def shrink(
        self, images: Sequence[Image.Image], clips: Sequence[Clip], budget: int
    ) -> tuple[list[Image.Image], list[Clip]] | None:
        """Make media smaller: all by the same factor; if that is not enough, take frames away.

        Args:
            images: of one sample.
            clips: of the same sample.
            budget: visual tokens that there is room for.

        Returns:
            The largest form that fits; None where even the smallest does not.
        """
        num_scales = self._num_scales(images, clips)

        def fits(step: int) -> bool:
            return self._count_scaled(images, clips, self._scale(step)) <= budget

        if fits(num_scales):
            scale = self._scale(_first(fits, num_scales))
            return [scale_image(image, scale) for image in images], [scale_clip(clip, scale) for clip in clips]
        scale = self._scale(num_scales)
        step = max(1, self._family.frame_step)
        longest = max((len(clip.indices) for clip in clips), default=0)
        for frames in range((longest - 1) // step * step, 0, -step):
            thinned = [keep_frames(clip, frames) for clip in clips]
            if self._count_scaled(images, thinned, scale) <= budget:
                return [scale_image(image, scale) for image in images], [scale_clip(clip, scale) for clip in thinned]
        return None

    def _count_scaled(self, images: Sequence[Image.Image], clips: Sequence[Clip], scale: float) -> int:
        count = sum(self._counter.count("image", 1, scaled_size(image.size, scale)) for image in images)
        for clip in clips:
            height, width = clip.frames.shape[1:3]
            count += self._counter.count("video", len(clip.indices), scaled_size((width, height), scale))
        return count

    def _num_scales(self, images: Sequence[Image.Image], clips: Sequence[Clip]) -> int:
        if not self._family.follows_resolution:
            return 0
        sides = [max(image.size) for image in images] + [max(clip.frames.shape[1:3]) for clip in clips]
        longest = max(sides, default=0)
        step = 0
        while longest * self._scale(step) > _SMALLEST_LONG_SIDE:
            step += 1
        return step

    @staticmethod
    def _scale(step: int) -> float:
        return float(2.0 ** (-step / _STEPS_PER_HALVING))


def _first(fits: Callable[[int], bool], last: int) -> int:
    """Find the first step that fits by halving, given that `last` does."""
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return high
