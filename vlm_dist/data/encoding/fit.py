"""Makes pictures smaller, then clips shorter, until a sample fits its number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from vlm_dist.data.encoding.encode import Encoder
from vlm_dist.data.encoding.labels import markers_alone
from vlm_dist.data.media.images import Picture, clear_side, image_size, scale_image, scaled_size
from vlm_dist.data.media.video import Clip, blank_clip, keep_frames, scale_clip
from vlm_dist.errors import SkipSample
from vlm_dist.families import Family

#: Two neighbouring scales differ by 2^(1/16), 4% of a side: what is given away of a budget is below a tenth.
_STEPS_PER_HALVING = 16
#: No side is made longer than this by the smallest scale; processors enlarge what is below their own minimum.
_SMALLEST_LONG_SIDE = 28
_MAX_COUNTED = 65_536

#: Blank media (frames, width, height) that a rule must be right about: of both orientations, small and large.
_PROBES = {
    "image": ((1, 200, 120), (1, 97, 331), (1, 64, 64), (1, 1100, 900)),
    "video": ((4, 200, 120), (6, 97, 331), (2, 64, 64)),
}
#: Times of frames are written out by some processors: a clip so much slower has longer ones.
_MUCH_SLOWER = 1000

Size = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True, slots=True)
class MediaSizes:
    """All that the number of visual tokens of a sample depends on.

    Attributes:
        images: size of each.
        clips: number of frames and size of each.
    """

    images: tuple[Size, ...] = ()
    clips: tuple[tuple[int, Size], ...] = ()

    @classmethod
    def of(cls, images: Sequence[Picture], clips: Sequence[Clip]) -> MediaSizes:
        """The sizes of decoded media."""
        shapes = tuple((len(clip.indices), (clip.frames.shape[2], clip.frames.shape[1])) for clip in clips)
        return cls(tuple(image_size(image) for image in images), shapes)

    @property
    def kinds(self) -> frozenset[str]:
        """What there is, of "image" and "video"."""
        return frozenset(kind for kind, items in (("image", self.images), ("video", self.clips)) if items)


@dataclass(frozen=True, slots=True)
class Reduction:
    """How the media of a sample are made smaller.

    Attributes:
        scale: of all sides.
        max_frames: that a clip keeps; None: all.
    """

    scale: float = 1.0
    max_frames: int | None = None

    def of_sizes(self, sizes: MediaSizes) -> MediaSizes:
        """The sizes that media of these sizes get."""
        clips = [
            (frames if self.max_frames is None else min(frames, self.max_frames), scaled_size(size, self.scale))
            for frames, size in sizes.clips
        ]
        return MediaSizes(tuple(scaled_size(size, self.scale) for size in sizes.images), tuple(clips))

    def of_media(self, images: Sequence[Picture], clips: Sequence[Clip]) -> tuple[list[Picture], list[Clip]]:
        """Make media smaller."""
        kept = list(clips) if self.max_frames is None else [keep_frames(clip, self.max_frames) for clip in clips]
        return [scale_image(image, self.scale) for image in images], [scale_clip(clip, self.scale) for clip in kept]


@dataclass(frozen=True, slots=True)
class _Rule:
    """How the number of tokens of an image or clip is told from its size.

    Attributes:
        constant: it is always the same.
        beside: comes to what the processor estimates, as it writes more than it counts.
    """

    constant: int | None = None
    beside: int = 0


class VisualCounter:
    """Number of tokens that the processor puts in the place of images and clips of given sizes.

    Processors can tell it from the sizes, mostly; where one cannot, or is wrong about a blank picture, blank pictures
    are measured.

    Args:
        encoder: calls the processor.
        processor: may estimate.
        markers: kind -> what a text has in the place of one image or video.
        family: says whether sizes matter.
    """

    def __init__(self, encoder: Encoder, processor: Any, markers: Mapping[str, str], family: Family) -> None:
        self._encoder = encoder
        self._processor = processor
        self._markers = markers
        self.kinds = frozenset(markers)
        self._measured: dict[tuple[int, int, int], int] = {}
        # asked for twice a sample, 0.4 ms each: processors check their arguments anew
        self._counted: dict[tuple[str, int, Size], int] = {}
        self._measured_together: dict[tuple[Size, ...], int] = {}
        self._additive = {kind for kind in markers if self._adds_up(kind)}
        self._rules: dict[str, _Rule] = {}
        for kind in markers:
            rule = self._find_rule(kind, constant=not family.follows_resolution)
            if rule is not None:
                self._rules[kind] = rule
        #: Kinds whose number of tokens is told without a picture.
        self.estimated = frozenset(self._rules)
        pair = tuple((width, height) for _, width, height in _PROBES["image"][:2])
        #: Whether an image has the same tokens beside others; some processors give each of several fewer.
        self._images_add_up = "image" not in markers or self._measure_together(pair) == sum(
            self.count("image", 1, size) for size in pair
        )

    @property
    def additive(self) -> frozenset[str]:
        """Kinds of which a sample has as many tokens more as `count` says, whatever else it has."""
        return frozenset(self._additive)

    def count(self, kind: str, frames: int, size: Size) -> int:
        """Count the tokens of one image (`frames` 1) or clip."""
        key = kind, frames, size
        if key not in self._counted:
            estimates = self._estimate_many(kind, [(frames, *size)]) if kind in self.estimated else None
            estimate = None if estimates is None else estimates[0]
            if len(self._counted) >= _MAX_COUNTED:
                self._counted.clear()
            self._counted[key] = self._measure(kind, frames, *size) if estimate is None else estimate
        return self._counted[key]

    def count_images(self, sizes: Sequence[Size]) -> int:
        """Count the tokens of all images of one sample."""
        if self._images_add_up or len(sizes) < 2:
            return sum(self.count("image", 1, size) for size in sizes)
        return self._measure_together(tuple(sizes))

    def count_many(self, kind: str, shapes: Sequence[tuple[int, Size]]) -> list[int]:
        """Count the tokens of each of many images or clips, given as (frames, size); 50 times faster than one by one.

        One that the processor refuses counts as 0.
        """
        if kind in self.estimated:
            estimates = self._estimate_many(kind, [(frames, *size) for frames, size in shapes])
            if estimates is not None:
                return estimates
        counts = []
        for frames, size in shapes:
            try:
                counts.append(self.count(kind, frames, size))
            except SkipSample:
                counts.append(0)
        return counts

    def _find_rule(self, kind: str, constant: bool) -> _Rule | None:
        """Find what tells the number of tokens of blank pictures of some sizes; None: they must be measured."""
        measured = [self._measure(kind, *shape) for shape in _PROBES[kind]]
        if constant and len(set(measured)) == 1:
            return _Rule(constant=measured[0])
        estimates = self._ask_processor(kind, _PROBES[kind])
        if estimates is None:
            return None
        beside = {one - estimate for one, estimate in zip(measured, estimates, strict=True)}
        return _Rule(beside=beside.pop()) if len(beside) == 1 else None

    def _adds_up(self, kind: str) -> bool:
        """Whether the tokens of an image or clip come to the text's as they are, at whatever times its frames lie."""
        rendered = markers_alone(self._markers[kind])
        num_text = self._encoder.measure_text(rendered).num_tokens
        frames, width, height = _PROBES[kind][0]
        if kind == "image":
            encoded = [self._encoder.encode(rendered, images=[Image.new("RGB", (width, height))])]
        else:
            clip = blank_clip(frames, width, height)
            slow = replace(clip, fps=clip.fps / _MUCH_SLOWER)
            encoded = [self._encoder.encode(rendered, clips=[one]) for one in (clip, slow)]
        return len({one.num_tokens for one in encoded}) == 1 and all(
            one.num_tokens == num_text + int(one.is_visual.sum()) for one in encoded
        )

    def _estimate_many(self, kind: str, shapes: Sequence[tuple[int, int, int]]) -> list[int] | None:
        rule = self._rules[kind]
        if rule.constant is not None:
            return [rule.constant] * len(shapes)
        estimates = self._ask_processor(kind, shapes)
        return None if estimates is None else [estimate + rule.beside for estimate in estimates]

    def _ask_processor(self, kind: str, shapes: Sequence[tuple[int, int, int]]) -> list[int] | None:
        estimator = getattr(self._processor, "_get_num_multimodal_tokens", None)
        if estimator is None:
            return None
        sizes: dict[str, Any] = {"image_sizes": [(clear_side(h), clear_side(w)) for _, w, h in shapes]}
        if kind == "video":
            sizes = {"video_sizes": [(frames, height, width) for frames, width, height in shapes]}
        try:
            estimates = [int(count) for count in estimator(**sizes)[f"num_{kind}_tokens"]]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            return None
        return estimates if len(estimates) == len(shapes) else None

    def _measure_together(self, sizes: tuple[Size, ...]) -> int:
        if sizes not in self._measured_together:
            if len(self._measured_together) >= _MAX_COUNTED:
                self._measured_together.clear()
            blanks = [Image.new("RGB", size) for size in sizes]
            encoded = self._encoder.encode(markers_alone(self._markers["image"], len(sizes)), images=blanks)
            self._measured_together[sizes] = int(encoded.is_visual.sum())
        return self._measured_together[sizes]

    def _measure(self, kind: str, frames: int, width: int, height: int) -> int:
        key = (frames if kind == "video" else 0, width, height)
        if key not in self._measured:
            rendered = markers_alone(self._markers[kind])
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
        self.counter = counter
        self._family = family

    def count(self, sizes: MediaSizes) -> int:
        """Predict the visual tokens of a sample."""
        count = self.counter.count_images(sizes.images)
        return count + sum(self.counter.count("video", frames, size) for frames, size in sizes.clips)

    def smallest(self, sizes: MediaSizes) -> int:
        """Predict the visual tokens of a sample's smallest form."""
        smallest = Reduction(_scale(self._num_scales(sizes)), self._family.frame_step)
        return self.count(smallest.of_sizes(sizes))

    def shrink(self, sizes: MediaSizes, budget: int) -> Reduction | None:
        """Make media smaller: all by the same factor; if that is not enough, take frames away.

        Args:
            sizes: of the media of one sample.
            budget: visual tokens that there is room for.

        Returns:
            What leads to the largest form that fits; None where even the smallest does not.
        """
        num_scales = self._num_scales(sizes)

        def fits(step: int) -> bool:
            return self.count(Reduction(_scale(step)).of_sizes(sizes)) <= budget

        if fits(num_scales):
            return Reduction(_scale(_first(fits, num_scales)))
        scale = _scale(num_scales)
        step = max(1, self._family.frame_step)
        longest = max((frames for frames, _ in sizes.clips), default=0)
        for frames in range((longest - 1) // step * step, 0, -step):
            reduction = Reduction(scale, frames)
            if self.count(reduction.of_sizes(sizes)) <= budget:
                return reduction
        return None

    def _num_scales(self, sizes: MediaSizes) -> int:
        if not self._family.follows_resolution:
            return 0
        longest = max([max(size) for size in sizes.images] + [max(size) for _, size in sizes.clips], default=0)
        step = 0
        while longest * _scale(step) > _SMALLEST_LONG_SIDE:
            step += 1
        return step


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
