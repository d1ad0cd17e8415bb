"""Images: from bytes to an upright picture of the configured mode and size."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from vlm_dist.errors import SkipSample

ResizeMode = Literal["keep_aspect", "crop", "stretch"]

#: A picture above this is an error of the data, or an attack: 179 million pixels are half a gigabyte of RGB.
MAX_IMAGE_PIXELS = 178_956_970

#: Raster formats alone: Pillow would also hand EPS to Ghostscript, a program, with bytes that nobody vouches for.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO")

_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def decode_image(
    source: bytes | Path,
    *,
    convert_to_rgb: bool = True,
    resize_mode: ResizeMode = "keep_aspect",
    max_size: int | None = None,
) -> Image.Image:
    """Decode a picture, turn it upright, and bring it to the configured mode and size.

    Args:
        source: an encoded picture, or the file that holds one.
        convert_to_rgb: False leaves the colour mode to the model's processor.
        resize_mode: how `max_size` is kept; see `resize_image`.
        max_size: longest side in pixels; None keeps the size.

    Raises:
        SkipSample: ("decode") it cannot be decoded, is cut, or has more than `MAX_IMAGE_PIXELS`.
    """
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures and of odd EXIF; we decide below
            with Image.open(stream, formats=_FORMATS) as opened:
                _check_pixels(opened.size)
                if opened.format == "JPEG" and max_size is not None and resize_mode == "keep_aspect":
                    # decoding at a half, quarter or eighth of the size is several times faster; never below max_size
                    opened.draft(None, (max_size, max_size))
                opened.load()
                image = ImageOps.exif_transpose(opened)
    except (
        OSError,
        ValueError,
        SyntaxError,
        TypeError,
        KeyError,
        EOFError,
        IndexError,
        Image.DecompressionBombError,
    ) as error:
        raise SkipSample("decode", f"cannot decode the image: {type(error).__name__}: {error}") from error
    if convert_to_rgb:
        image = to_rgb(image)
    return resize_image(image, resize_mode, max_size)


def _check_pixels(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_IMAGE_PIXELS:
        raise SkipSample("decode", f"the image has {size[0]} x {size[1]} pixels; the limit is {MAX_IMAGE_PIXELS}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: transparency onto white, 16 bits scaled down (Pillow would clip them)."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BIT_MODES or image.mode == "F":
        return _grey_to_rgb(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    peak = float(values.max()) if values.size else 0.0
    if image.mode == "F" and peak <= 1.0:
        values *= 255.0
    elif image.mode != "F" and (image.mode != "I" or peak > 255):
        values /= 257.0  # 65535 -> 255; mode I with values below 256 is an 8-bit picture in a wide type
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")


def resize_image(image: Image.Image, mode: ResizeMode, max_size: int | None) -> Image.Image:
    """Bring a picture to `max_size`.

    Args:
        image: any picture.
        mode: "keep_aspect" shrinks the longest side to `max_size` and never enlarges; "crop" takes the centre and
            "stretch" the whole, both as a square of `max_size`.
        max_size: pixels; None keeps the picture.
    """
    if max_size is None:
        return image
    if mode == "keep_aspect":
        longest = max(image.size)
        return image if longest <= max_size else scale_image(image, max_size / longest)
    if image.size == (max_size, max_size):
        return image
    if mode == "crop":
        return ImageOps.fit(image, (max_size, max_size), Image.Resampling.BICUBIC)
    return image.resize((max_size, max_size), Image.Resampling.BICUBIC)


def scaled_size(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """Scale (width, height), at least one pixel each."""
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def scale_image(image: Image.Image, factor: float) -> Image.Image:
    """Scale a picture by a factor; 1 returns it as it is."""
    size = scaled_size(image.size, factor)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
