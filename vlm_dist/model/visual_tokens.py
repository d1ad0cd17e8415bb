"""How many patches the pictures and clips of a micro-batch have, from shapes and grids alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vlm_dist.model.towers import find_towers, is_within

# Shapes: N pictures (or crops, or frames), P patches, H x W pixels

_GRIDS = ("image_grid_thw", "video_grid_thw")
_PIXELS = ("pixel_values", "pixel_values_videos")


@dataclass(frozen=True)
class VisualTokens:
    """What the vision tower and the projector see of a micro-batch.

    Attributes:
        streams: "pixels" (patches as they are cut), "patches" (in the blocks, with class tokens), "features" (without),
            "features/4" and the like, "images", "latents", "soft tokens" -> how many.
        squares: "full" -> sum of squares of the patches that see each other; "window" -> the same where they see a
            window alone; "latents" -> pairs of a query and what it sees.
        dense_squares: what is computed where the attention masks all pictures out of one long row; None: `squares`.
    """

    streams: Mapping[str, float] = field(default_factory=dict)
    squares: Mapping[str, float] = field(default_factory=dict)
    dense_squares: float | None = None


@dataclass(frozen=True)
class VisualLayout:
    """How a model cuts pictures up.

    Attributes:
        patch: sides of a patch in pixels.
        class_tokens: of each picture, beside its patches.
        merge: patches of a grid that become one token, along a side.
        window: side of a window of attention, in merged patches; None: none.
        num_latents: queries of a resampler.
        num_soft_tokens: of each picture, where the projector pools to a fixed number.
        pool: by which the sides of a video's frames are pooled before the projector.
        pinpoints: sizes that pictures are cut into crops by.
        crop_side: of such a crop, in pixels.
        is_one_row: all pictures are one row of patches behind a mask.
        is_fixed: every picture (or crop) has as many patches.
    """

    patch: tuple[int, int] = (1, 1)
    class_tokens: int = 0
    merge: int = 1
    window: int | None = None
    num_latents: int = 0
    num_soft_tokens: int = 0
    pool: int = 1
    pinpoints: Any = None
    crop_side: int = 0
    is_one_row: bool = False
    is_fixed: bool = True

    def tokens(self, inputs: Mapping[str, Any]) -> VisualTokens:
        """Count the patches of a micro-batch.

        Args:
            inputs: of the model; of pixels the shapes are read.
        """
        grids = [tuple(map(int, row)) for key in _GRIDS if inputs.get(key) is not None for row in inputs[key].tolist()]
        if grids:
            return self.of_grids(grids)
        pictures: list[int] = []
        features = pixels_seen = 0.0
        for key in _PIXELS:
            pixels = inputs.get(key)
            if pixels is None:
                continue
            sizes = list(self._sizes(key, pixels, inputs))
            patches = [(height // self.patch[0]) * (width // self.patch[1]) for height, width in sizes]
            pictures += [count + self.class_tokens for count in patches]
            height, width = (int(side) for side in pixels.shape[-2:])
            pixels_seen += len(patches) * (height // self.patch[0]) * (width // self.patch[1])
            pool = self.pool**2 if key == "pixel_values_videos" else 1
            features += sum(patches) / pool
        return self._of_pictures(pictures, features, pixels_seen)

    def of_grids(self, grids: list[tuple[int, ...]]) -> VisualTokens:
        """Count the patches of pictures and clips given as grids: frames, rows and columns of patches."""
        total = sum(frames * rows * columns for frames, rows, columns in grids)
        full = float(sum(frames * (rows * columns) ** 2 for frames, rows, columns in grids))
        windows = float(sum(frames * self._windows(rows) * self._windows(columns) for frames, rows, columns in grids))
        return VisualTokens(self._streams(total, total, len(grids), total), {"full": full, "window": windows})

    def of_pictures(self, count: float) -> VisualTokens:
        """Count the patches of so many pictures (or crops) of the fixed size."""
        alone = (self.crop_side // self.patch[0]) * (self.crop_side // self.patch[1])
        one = self._of_pictures([alone + self.class_tokens], alone, alone)
        return VisualTokens(
            {name: number * count for name, number in one.streams.items()},
            {name: number * count for name, number in one.squares.items()},
        )

    def _of_pictures(self, pictures: list[int], features: float, pixels_seen: float) -> VisualTokens:
        total, full = sum(pictures), float(sum(count**2 for count in pictures))
        context = sum(count * self.num_latents + self.num_latents**2 for count in pictures)
        streams = self._streams(total, features, len(pictures), pixels_seen)
        squares = {"full": full, "window": full, "latents": float(context)}
        return VisualTokens(streams, squares, float(total**2) if self.is_one_row else None)

    def _streams(self, patches: float, features: float, images: int, pixels_seen: float) -> dict[str, float]:
        latents = self.num_latents * images
        return {
            "pixels": float(pixels_seen),
            "patches": float(patches),
            "features": float(features),
            **{f"features/{count}": features / count for count in (4, 9, 16, 25, 36, 64)},
            "images": float(images),
            "latents": float(latents),
            "latents and features": float(latents + features),
            "soft tokens": float(self.num_soft_tokens * images),
        }

    def _windows(self, patches: int) -> int:
        """Sum of squares of the lengths that windows cut a side into."""
        if self.window is None:
            return patches**2
        merged, side = patches // self.merge, self.window
        whole, rest = divmod(merged, side)
        return self.merge**2 * (whole * side**2 + rest**2)

    def _sizes(self, key: str, pixels: Any, inputs: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
        """Height and width of each picture that the tower is given."""
        height, width = (int(side) for side in pixels.shape[-2:])
        count = 1
        for length in pixels.shape[:-3]:
            count *= int(length)
        sizes = inputs.get("image_sizes") if key == "pixel_values" else None
        if self.pinpoints is not None and sizes is not None and pixels.dim() == 5:
            count = sum(self._crops(sizes, inputs))
        elif self.is_one_row and sizes is not None:
            yield from ((int(row[0]), int(row[1])) for row in sizes.tolist())
            return
        elif inputs.get("pixel_attention_mask") is not None:
            mask = inputs["pixel_attention_mask"]  # a picture that is padding has no pixel in it
            count = int(mask.flatten(0, -3).flatten(1).any(1).sum())
        for _ in range(count):
            yield height, width

    def _crops(self, sizes: Any, inputs: Mapping[str, Any]) -> list[int]:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        several = inputs.get("batch_num_images")
        alone = [True] * len(sizes)
        if several is not None:
            alone = [int(n) == 1 for n in several.tolist() for _ in range(int(n))]
        return [
            int(image_size_to_num_patches(size.tolist(), self.pinpoints, self.crop_side)) if is_alone else 1
            for size, is_alone in zip(sizes, alone, strict=True)
        ]


def visual_layout(base: Any) -> VisualLayout:
    """Read from a model how it cuts pictures up.

    Args:
        base: a transformers model.
    """
    towers = find_towers(base)
    config = base.config
    vision: Any = getattr(config, "vision_config", None)
    patch = next(
        (
            (int(module.kernel_size[-2]), int(module.kernel_size[-1]))
            for name, module in base.named_modules()
            if isinstance(module, nn.Conv2d | nn.Conv3d) and is_within(name, towers["vision"])
        ),
        (1, 1),
    )
    names = [name.rsplit(".", 1)[-1] for name, _ in base.named_parameters() if is_within(name, towers["vision"])]
    merge = int(getattr(vision, "spatial_merge_size", 1) or 1)
    window = getattr(vision, "window_size", None) if hasattr(vision, "fullatt_block_indexes") else None
    latents = getattr(getattr(config, "perceiver_config", None), "resampler_n_latents", 0)
    side = getattr(vision, "image_size", 0) or 0
    has_pool = any(name.endswith("vision_resampler") for name, _ in base.named_modules())
    return VisualLayout(
        patch=patch,
        class_tokens=int(any(name in ("class_embedding", "cls_token") for name in names)),
        merge=merge,
        window=None if not window else int(window) // merge // patch[0],
        num_latents=int(latents or 0),
        num_soft_tokens=int(getattr(config, "mm_tokens_per_image", 0) or 0),
        pool=int(getattr(config, "spatial_pool_stride", 1) or 1) if has_pool else 1,
        pinpoints=getattr(config, "image_grid_pinpoints", None),
        crop_side=int(side[0] if isinstance(side, list | tuple) else side),
        is_one_row=getattr(vision, "model_type", "") == "pixtral",
        is_fixed=not hasattr(vision, "temporal_patch_size") and getattr(vision, "model_type", "") != "pixtral",
    )
