"""A faster form of image processors that cut pictures into patches (Qwen2-VL and its relatives), equal bit for bit.

transformers checks its arguments for longer than it works, and reorders a picture with each frame twice; here a picture
is reordered once, and what is the same is copied as a whole. Half the time.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

log = logging.getLogger(__name__)

# Shapes: P patches of a picture, C channels, F frames per patch, s side of a patch, m side of a merged block in patches

_PARTS = ("resize", "patchify", "rescale_and_normalize", "patch_size", "merge_size", "temporal_patch_size", "size")
_PROBE_SIZES = ((20, 30), (200, 120), (130, 330))  # width, height: enlarged, and of both orientations


def with_fast_patches(processor: Any) -> Any:
    """Return the processor with a fast image processor, where one is known that gives the very same; else as it is."""
    images = getattr(processor, "image_processor", None)
    if images is None or isinstance(images, PatchImages) or not all(hasattr(images, part) for part in _PARTS):
        return processor
    try:
        fast = PatchImages(images)
        proven = _is_proven(fast, images)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        log.debug("%s has no fast form: %s", type(images).__name__, error)  # another version, or a model of its own
        return processor
    if not proven:
        return processor
    replaced = copy.copy(processor)
    replaced.image_processor = fast
    return replaced


class PatchImages:
    """Takes the place of an image processor; whatever it does not know, it leaves to that one.

    Args:
        slow: the model's own image processor.
    """

    def __init__(self, slow: Any) -> None:
        self._slow = slow
        self._is_plain = bool(
            slow.do_resize and slow.do_rescale and slow.do_normalize and slow.do_convert_rgb is not False
        )
        mean, std, _ = slow._fuse_mean_std_and_rescale_factor(
            do_normalize=True,
            image_mean=tuple(slow.image_mean),
            image_std=tuple(slow.image_std),
            do_rescale=True,
            rescale_factor=slow.rescale_factor,
            device=torch.device("cpu"),
        )
        self._mean = mean.view(-1, 1, 1)  # [C, 1, 1]
        self._std = std.view(-1, 1, 1)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_slow" not in self.__dict__:  # while it is unpickled or copied
            raise AttributeError(name)
        return getattr(self._slow, name)

    def __call__(self, images: Any, **arguments: Any) -> Any:
        """Make `pixel_values [P, C x F x s x s]` and `image_grid_thw [N, 3]` of N pictures."""
        pictures = _pixels_of(images)
        settings = {name: value for name, value in arguments.items() if value is not None}
        if pictures is None or not self._is_plain or settings.pop("return_tensors", None) != "pt" or settings:
            return self._slow(images, **arguments)
        parts = [self._patches(picture) for picture in pictures]
        patches = [part for part, _ in parts]
        return {
            "pixel_values": patches[0] if len(patches) == 1 else torch.cat(patches),
            "image_grid_thw": torch.tensor([[1, *grid] for _, grid in parts]),
        }

    def _patches(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Make the patches of one picture, uint8 [C, H, W]: float32 [P, C x F x s x s], and their rows and columns."""
        slow = self._slow
        size, merge, frames = slow.patch_size, slow.merge_size, slow.temporal_patch_size
        resized = slow.resize(images=pixels[None], size=slow.size, resample=slow.resample, factor=size * merge)[0]
        channels, height, width = resized.shape
        rows, columns = height // size, width // size
        values = resized.to(torch.float32, memory_format=torch.contiguous_format).sub_(self._mean).div_(self._std)
        blocks = values.view(channels, rows // merge, merge, size, columns // merge, merge, size)
        patches = torch.empty((rows // merge, columns // merge, merge, merge, channels, frames, size, size))
        first = patches[:, :, :, :, :, 0]
        first.copy_(blocks.permute(1, 4, 2, 5, 0, 3, 6))
        for frame in range(1, frames):
            patches[:, :, :, :, :, frame] = first
        return patches.view(rows * columns, -1), (rows, columns)


def _pixels_of(images: Any) -> list[Tensor] | None:
    """Flatten one level of lists into uint8 [3, H, W] each; None unless all are RGB pictures."""
    flat: list[Any] = []
    for item in images if isinstance(images, list | tuple) else [images]:
        flat.extend(item if isinstance(item, list | tuple) else [item])
    pixels: list[Tensor] = []
    for one in flat:
        if isinstance(one, Tensor) and one.dtype == torch.uint8 and one.ndim == 3 and one.shape[0] == 3:
            pixels.append(one)
        elif isinstance(one, Image.Image) and one.mode == "RGB":
            pixels.append(torch.from_numpy(np.array(one)).permute(2, 0, 1))
        else:
            return None
    return pixels or None


def _is_proven(fast: PatchImages, slow: Any) -> bool:
    """Compare both on some pictures."""
    noise = np.random.default_rng(0)
    pictures = [
        Image.fromarray(noise.integers(0, 256, (height, width, 3)).astype(np.uint8)) for width, height in _PROBE_SIZES
    ]
    tensors = [torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous() for picture in pictures]
    samples: list[list[Any]] = [*([picture] for picture in pictures), pictures, tensors]
    for sample in samples:
        ours = fast([sample], return_tensors="pt")
        theirs = slow([sample], return_tensors="pt")
        if set(ours) != set(theirs) or not all(torch.equal(ours[key], theirs[key]) for key in theirs):
            log.debug("%s differs from its fast form; it is used as it is", type(slow).__name__)
            return False
    return True
