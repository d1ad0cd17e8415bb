"""Images: from bytes to an upright picture of the configured mode and size.

Pillow reads every header and is the reference for the pixels. JPEG and WebP are decoded by torchvision, which gives the
same pixels bit for bit and is faster; what it refuses goes to Pillow, whose verdict counts. PNG is left to Pillow:
torchvision's PNG decoder is no faster and dies with SIGSEGV on some damaged files. Colour profiles (ICC) are ignored.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vlm_dist.data.media.limits import IMAGE_FORMATS, MAX_IMAGE_PIXELS
from vlm_dist.data.media.named import naming
from vlm_dist.errors import SkipSample

ResizeMode = Literal["keep_aspect", "crop", "stretch"]

#: A decoded picture: RGB pixels, [3, H, W] uint8; or, where the colour mode is left alone, Pillow's own.
#: Processors take tensors as they are: to make a Pillow picture of the pixels and take it apart again costs 1 ms of 10.
Picture = Tensor | Image.Image

_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")

_EXIF_ORIENTATION = 0x0112
_QUARTER_TURNS = {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}  # counter-clockwise, after the mirroring
_MIRRORED = (2, 4, 5, 7)  # left to right, before the turning

#: What Pillow and its decoders raise on damaged bytes.
_DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    EOFError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
    MemoryError,  # of a damaged size; a machine that runs out of memory kills the process instead
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

if "PILLOW_BLOCKS_MAX" not in os.environ:
    # up to 128 MiB of freed pixels are kept for the next picture: 4000 x 3000 pixels decode 1.5 times as fast
    Image.core.set_blocks_max(8)  # type: ignore[attr-defined]  # documented with PILLOW_BLOCKS_MAX


def decode_image(
    data: bytes,
    *,
    convert_to_rgb: bool = True,
    resize_mode: ResizeMode = "keep_aspect",
    max_size: int | None = None,
) -> Picture:
    """Decode a picture, turn it upright, and bring it to the configured mode and size.

    The format is told by the content, whatever the name says. Of an animation the first frame is taken.

    Args:
        data: an encoded picture.
        convert_to_rgb: False leaves the colour mode to the model's processor, and the picture to Pillow.
        resize_mode: how `max_size` is kept; see `resize_image`.
        max_size: longest side in pixels; None keeps the size.

    Returns:
        RGB pixels, [3, H, W] uint8; a Pillow picture where `convert_to_rgb` is False.

    Raises:
        SkipSample: ("decode") it cannot be decoded, is cut, or has more than `MAX_IMAGE_PIXELS`.
    """
    with naming(data):
        picture = _decode(data, convert_to_rgb)
    return resize_image(picture, resize_mode, max_size)


def _decode(data: bytes, convert_to_rgb: bool) -> Picture:
    if not data:
        raise SkipSample("decode", "the image is empty: it has 0 bytes")
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures and of odd EXIF, torch of memory that it must not write to; we decide below
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as opened:
                _check_pixels(opened.size)
                picture: Picture | None = _decode_with_torchvision(opened, data) if convert_to_rgb else None
                if picture is None:
                    opened.load()
                    image = ImageOps.exif_transpose(opened)
                    picture = _as_tensor(to_rgb(image)) if convert_to_rgb else image
    except UnidentifiedImageError as error:  # its own message is a place in memory
        raise SkipSample("decode", "cannot decode the image: it is in no known format") from error
    except _DECODE_ERRORS as error:
        raise SkipSample("decode", f"cannot decode the image: {type(error).__name__}: {error}") from error
    return picture


def _check_pixels(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_IMAGE_PIXELS:
        raise SkipSample("decode", f"the image has {size[0]} x {size[1]} pixels; the limit is {MAX_IMAGE_PIXELS}")


def _decode_with_torchvision(opened: Image.Image, data: bytes) -> Tensor | None:
    """Decode upright RGB where torchvision gives the pixels of Pillow.

    Args:
        opened: by Pillow, which has read the header only.
        data: the same picture, encoded.

    Returns:
        [3, H, W] uint8; None where Pillow has to decode.
    """
    if opened.format in ("JPEG", "MPO"):
        exact = opened.mode in ("RGB", "L")  # CMYK and YCCK are converted by another rule
    else:
        exact = opened.format == "WEBP" and opened.mode == "RGB" and not getattr(opened, "is_animated", False)
    if not exact:
        return None
    from torchvision.io import ImageReadMode, decode_jpeg, decode_webp

    encoded = torch.frombuffer(data, dtype=torch.uint8)
    try:
        if opened.format == "WEBP":
            pixels: Tensor = decode_webp(encoded, mode=ImageReadMode.RGB)
        else:
            pixels = decode_jpeg(encoded, mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError):
        return None
    if pixels.shape != (3, opened.height, opened.width):
        return None
    orientation = opened.getexif().get(_EXIF_ORIENTATION, 1)
    if orientation in _MIRRORED:
        pixels = pixels.flip(2)
    turns = _QUARTER_TURNS.get(orientation, 0)
    return pixels.rot90(turns, (1, 2)) if turns else pixels


def _as_tensor(image: Image.Image) -> Tensor:
    """[3, H, W] uint8 of an RGB picture; the colours of a pixel lie together, as torchvision's decoders leave them."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def as_pil(picture: Picture) -> Image.Image:
    """Make a Pillow picture, for processors that know no other."""
    if isinstance(picture, Image.Image):
        return picture
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def with_clear_sides(picture: Picture) -> Picture:
    """The picture with sides that no processor takes for its colours (see `clear_side`); its pixels are repeated."""
    size = image_size(picture)
    width, height = map(clear_side, size)
    if (width, height) == size:
        return picture
    if isinstance(picture, Image.Image):
        return picture.resize((width, height), Image.Resampling.NEAREST)
    return torch.nn.functional.interpolate(picture[None], (height, width), mode="nearest-exact")[0]


def clear_side(side: int) -> int:
    """A side in pixels, at least 5: processors guess which dimension has the 1, 3 or 4 colours."""
    return max(side, 5)


def image_size(picture: Picture) -> tuple[int, int]:
    """(width, height) in pixels."""
    if isinstance(picture, Image.Image):
        return picture.size
    return int(picture.shape[2]), int(picture.shape[1])


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
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    peak = float(values.max()) if values.size else 0.0
    if image.mode == "F" and peak <= 1.0:
        values *= 255.0
    elif image.mode != "F" and (image.mode != "I" or peak > 255):
        values /= 257.0  # 65535 -> 255; mode I with values below 256 is an 8-bit picture in a wide type
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")


def resize_image(picture: Picture, mode: ResizeMode, max_size: int | None) -> Picture:
    """Bring a picture to `max_size`.

    Args:
        picture: any.
        mode: "keep_aspect" shrinks the longest side to `max_size` and never enlarges; "crop" takes the centre and
            "stretch" the whole, both as a square of `max_size`.
        max_size: pixels; None keeps the picture.
    """
    if max_size is None:
        return picture
    size = image_size(picture)
    if mode == "keep_aspect":
        return picture if max(size) <= max_size else scale_image(picture, max_size / max(size))
    if mode == "crop":
        picture = _centre_square(picture)
    return _resize(picture, (max_size, max_size))


def scaled_size(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """Scale (width, height), at least one pixel each."""
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def scale_image(picture: Picture, factor: float) -> Picture:
    """Scale a picture by a factor; 1 returns it as it is."""
    return _resize(picture, scaled_size(image_size(picture), factor))


def _centre_square(picture: Picture) -> Picture:
    width, height = image_size(picture)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if isinstance(picture, Image.Image):
        return picture.crop((left, top, left + side, top + side))
    return picture[:, top : top + side, left : left + side]


def _resize(picture: Picture, size: tuple[int, int]) -> Picture:
    """Bicubic, antialiased: of pixels by torch, the kernel of the models' own processors.

    At 1024 x 768 -> 448 x 336 that takes a tenth of Pillow's time; three values in a thousand differ, by one level.
    """
    if size == image_size(picture):
        return picture
    if isinstance(picture, Image.Image):
        return picture.resize(size, Image.Resampling.BICUBIC)
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    width, height = size
    resized: Tensor = resize(picture, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return resized
