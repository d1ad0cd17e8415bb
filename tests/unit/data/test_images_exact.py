"""Whatever decodes a picture, its pixels are those that Pillow gives; what Pillow refuses is refused."""

import io
import random

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tests.unit.data.samples import noise
from vlm_dist.data.index.facts import probe_image
from vlm_dist.data.media import images
from vlm_dist.data.media.images import as_pil, decode_image, image_size, to_rgb
from vlm_dist.errors import SkipSample

ORIENTATION = 0x0112


def pillow_alone(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        return np.asarray(to_rgb(ImageOps.exif_transpose(opened)))


def picture(width: int, height: int, mode: str, seed: int) -> Image.Image:
    """Blocks of noise, so that there is something to subsample."""
    blocks = np.kron(noise(width // 4 + 1, height // 4 + 1, seed), np.ones((4, 4, 1), np.uint8))
    rgb = Image.fromarray(np.ascontiguousarray(blocks[:height, :width]))
    if mode == "I;16":
        return Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    image = rgb.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(rgb.getchannel("G"))
    return image


def encoded(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "L", "P", "1", "RGBA", "LA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("RGB", "L", "P", "1", "RGBA", "CMYK", "I;16"),
    "GIF": ("P", "L"),
    "BMP": ("RGB", "L", "P", "1"),
}
TURNABLE = ("JPEG", "PNG", "WEBP", "TIFF")


@st.composite
def files(draw):
    form = draw(st.sampled_from(sorted(MODES)))
    mode = draw(st.sampled_from(MODES[form]))
    image = picture(draw(st.integers(1, 70)), draw(st.integers(1, 70)), mode, draw(st.integers(0, 9)))
    options = {}
    if form == "JPEG":
        options = {
            "quality": draw(st.sampled_from((20, 75, 95, 100))),
            "subsampling": draw(st.sampled_from((0, 1, 2))),
            "progressive": draw(st.booleans()),
            "optimize": draw(st.booleans()),
            "restart_marker_blocks": draw(st.sampled_from((0, 3))),
        }
        if mode == "RGB":
            options["keep_rgb"] = draw(st.booleans()) and options["subsampling"] == 0
    if form == "WEBP":
        options = {"lossless": draw(st.booleans()), "quality": draw(st.sampled_from((10, 90)))}
    if form == "PNG" and mode == "P":
        options["transparency"] = draw(st.sampled_from((0, b"\x00\x80")))
    if form in TURNABLE and draw(st.booleans()):
        exif = Image.Exif()
        exif[ORIENTATION] = draw(st.integers(1, 8))
        options["exif"] = exif
    return encoded(image, form, **options)


@settings(max_examples=300, deadline=None)
@given(data=files())
def test_pixels_are_those_of_pillow(data):
    ours = decode_image(data)
    assert ours.dtype == torch.uint8
    assert np.array_equal(ours.permute(1, 2, 0).numpy(), pillow_alone(data))
    assert probe_image(data) == image_size(ours)  # the index says the same


@pytest.mark.parametrize("sampling", ["411", "420", "422", "440", "444"])
def test_all_ways_of_subsampling(sampling):
    factor = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{sampling}")
    for width, height in ((1, 1), (33, 17), (120, 90)):
        pixels = np.asarray(picture(width, height, "RGB", 1))
        done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor])
        assert done
        ours = decode_image(data.tobytes()).permute(1, 2, 0).numpy()
        assert np.array_equal(ours, pillow_alone(data.tobytes()))


def test_ycck_is_inverted_as_adobe_writes_it():
    data = bytearray(encoded(picture(32, 24, "CMYK", 0), "JPEG"))
    adobe = data.index(b"Adobe")
    assert data[adobe + 11] == 0  # CMYK as it is
    data[adobe + 11] = 2  # YCCK
    assert np.array_equal(np.asarray(as_pil(decode_image(bytes(data)))), pillow_alone(bytes(data)))


def test_orientation_that_comes_behind_the_pixels_counts():
    plain = encoded(picture(20, 10, "RGB", 0), "PNG")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    marked = encoded(picture(20, 10, "RGB", 0), "PNG", exif=exif)
    start = marked.index(b"eXIf") - 4
    chunk = marked[start : start + 12 + int.from_bytes(marked[start : start + 4], "big")]
    assert image_size(decode_image(plain[:-12] + chunk + plain[-12:])) == (10, 20)


def test_the_first_frame_of_an_animation_is_taken():
    first, second = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (30, 20), "blue")
    for form in ("GIF", "WEBP", "PNG"):
        data = encoded(first, form, save_all=True, append_images=[second])
        red, _, blue = as_pil(decode_image(data)).getpixel((5, 5))
        assert red > 240 and blue < 10, form


def test_the_fast_decoder_is_used_where_it_is_exact(monkeypatch):
    """Else this file would compare Pillow with itself."""
    called = []
    original = images._decode_with_torchvision
    monkeypatch.setattr(
        images,
        "_decode_with_torchvision",
        lambda *given: called.append(original(*given) is not None) or original(*given),
    )
    for form, mode, fast in (
        ("JPEG", "RGB", True),
        ("JPEG", "L", True),
        ("WEBP", "RGB", True),
        ("JPEG", "CMYK", False),
    ):
        decode_image(encoded(picture(30, 20, mode, 0), form))
        assert called.pop() is fast, (form, mode)


@pytest.mark.parametrize(
    ("form", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("PNG", {})]
)
def test_of_damaged_files_all_that_is_accepted_is_as_pillow_has_it(form, options):
    whole = encoded(picture(60, 44, "RGB", 3), form, **options)
    chance = random.Random(0)
    for number in range(150):
        data = bytearray(whole)
        if number % 2:
            data = data[: chance.randrange(len(data))]
        else:
            for _ in range(chance.choice((1, 1, 5))):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        try:
            expected = pillow_alone(bytes(data))
        except (OSError, SyntaxError, ValueError):
            with pytest.raises(SkipSample):
                decode_image(bytes(data))
            continue
        assert np.array_equal(decode_image(bytes(data)).permute(1, 2, 0).numpy(), expected)
