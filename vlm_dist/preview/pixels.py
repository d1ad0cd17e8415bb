"""Pictures out of the tensors that the vision tower gets: the processor's last steps, undone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vlm_dist.data.media.images import Picture, as_pil, to_rgb

_NAMES = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}
_QUALITY = 85


def pictures_of_tensors(
    visual: Mapping[str, Tensor], processor: Any, kind: Literal["image", "video"]
) -> list[list[NDArray[np.uint8]]]:
    """Undo normalisation and the cut into patches.

    Args:
        visual: a sample's tensors, as the processor made them.
        processor: of the model; tells mean, deviation and sizes of patches.
        kind: images or videos.

    Returns:
        Per image or video its frames, [H, W, 3] each. Where the processor cuts pictures into tiles there is one entry
        with all tiles; where its layout is not known there is none.
    """
    name, grid_name = _NAMES[kind]
    pixels, grid = visual.get(name), visual.get(grid_name)
    part = getattr(processor, f"{kind}_processor", None) or getattr(processor, "image_processor", None)
    if pixels is None or part is None or not pixels.is_floating_point():
        return []
    if grid is not None:
        cut = _joined_patches(pixels, grid, part)
        if kind == "image":  # which is repeated over the depth of a patch
            cut = [frames[:1] for frames in cut]
        return [[_as_bytes(frame, part) for frame in frames] for frames in cut]
    if pixels.ndim < 4 or pixels.shape[-3] != 3:
        return []
    if kind == "video" and pixels.ndim == 5:  # [videos, frames, 3, H, W]
        return [[_as_bytes(frame, part) for frame in video] for video in pixels]
    tiles = [_as_bytes(tile, part) for tile in pixels.reshape(-1, *pixels.shape[-3:])]
    if pixels.ndim != 4:
        return [tiles]
    sizes = visual.get("image_sizes")
    if sizes is not None and sizes.shape == (len(tiles), 2):  # filled up at their ends, to be stacked
        tiles = [tile[:height, :width] for tile, (height, width) in zip(tiles, sizes.tolist(), strict=True)]
    return [[tile] for tile in tiles]


def _joined_patches(pixels: Tensor, grid: Tensor, part: Any) -> list[Tensor]:
    """Frames [F, 3, H, W] of each picture, from patches in the order of Qwen2-VL."""
    patch, merge = int(getattr(part, "patch_size", 0) or 0), int(getattr(part, "merge_size", 0) or 0)
    depth = int(getattr(part, "temporal_patch_size", 0) or 0)
    if pixels.ndim != 2 or grid.ndim != 2 or pixels.shape[1] != 3 * depth * patch**2:
        return []
    sizes = [int(one.prod()) for one in grid]
    if sum(sizes) != pixels.shape[0]:
        return []
    found = []
    for (times, rows, columns), patches in zip(grid.tolist(), pixels.split(sizes), strict=True):
        if rows % merge or columns % merge:
            return []
        blocks = patches.reshape(times, rows // merge, columns // merge, merge, merge, 3, depth, patch, patch)
        frames = blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
        found.append(frames.reshape(times * depth, 3, rows * patch, columns * patch))
    return found


def _as_bytes(pixels: Tensor, part: Any) -> NDArray[np.uint8]:
    """[3, H, W] as the tower gets it -> [H, W, 3] as a screen does."""
    values = pixels.float()
    if getattr(part, "do_normalize", True):
        mean = torch.tensor(getattr(part, "image_mean", None) or [0.0] * 3).view(3, 1, 1)
        deviation = torch.tensor(getattr(part, "image_std", None) or [1.0] * 3).view(3, 1, 1)
        values = values * deviation + mean
    if getattr(part, "do_rescale", True):
        values = values / float(getattr(part, "rescale_factor", None) or 1 / 255)
    found: NDArray[np.uint8] = values.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return found


def thumbnail(picture: Picture | NDArray[np.uint8], longest: int) -> bytes:
    """A JPEG of bounded size; small pictures are left as they are.

    Args:
        picture: any.
        longest: side in pixels.
    """
    image = Image.fromarray(np.ascontiguousarray(picture)) if isinstance(picture, np.ndarray) else as_pil(picture)
    image = to_rgb(image)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    if max(image.size) <= longest // 4:  # every pixel counts
        image.save(stream, "PNG")
    else:
        image.save(stream, "JPEG", quality=_QUALITY)
    return stream.getvalue()


def evenly(count: int, most: int) -> Sequence[int]:
    """Positions of at most so many of `count`, spread evenly."""
    return range(count) if count <= most else [index * count // most for index in range(most)]
