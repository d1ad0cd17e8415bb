"""Images: upright, RGB, of the configured size; damaged ones are skipped, never raised as anything else."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.unit.data.samples import jpeg, noise, png
from vlm_dist.data.media import images
from vlm_dist.data.media.images import decode_image, resize_image
from vlm_dist.errors import SkipSample


def test_a_path_and_its_bytes_give_the_same_picture(tmp_path):
    data = jpeg(40, 30)
    (tmp_path / "a.jpg").write_bytes(data)
    assert decode_image(data).tobytes() == decode_image(tmp_path / "a.jpg").tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    upright = Image.new("RGB", (40, 24), "white")
    upright.paste((255, 0, 0), (0, 0, 20, 12))  # red in the upper left
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> the transposition that undoes it
    stored = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    stored.save(stream, "PNG", exif=exif)
    image = decode_image(stream.getvalue())
    assert image.size == (40, 24)
    assert image.getpixel((2, 2)) == (255, 0, 0)
    assert image.getpixel((38, 22)) == (255, 255, 255)


def test_every_mode_becomes_rgb():
    grey16 = Image.fromarray(np.full((4, 4), 65535 // 2, np.uint16))
    assert decode_image(png(grey16)).getpixel((0, 0)) == (127, 127, 127)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode_image(png(clear)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("RGB", (4, 4), (0, 0, 255)).convert("P")
    assert decode_image(png(palette)).getpixel((0, 0)) == (0, 0, 255)
    assert decode_image(png(Image.new("1", (4, 4), 1))).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(png(Image.new("LA", (4, 4), (7, 255)))).getpixel((0, 0)) == (7, 7, 7)
    stream = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(stream, "JPEG")
    red, green, blue = decode_image(stream.getvalue()).getpixel((0, 0))
    assert red > 240
    assert max(green, blue) < 15
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(stream, "TIFF")
    assert decode_image(stream.getvalue()).getpixel((0, 0)) == (128, 128, 128)


def test_convert_to_rgb_false_leaves_the_mode():
    assert decode_image(png(Image.new("L", (4, 4))), convert_to_rgb=False).mode == "L"


@pytest.mark.parametrize(
    "data", [b"", b"no image", jpeg()[:200], jpeg(200, 200)[:-4000], png(Image.new("L", (90, 90)))[:60]]
)
def test_what_cannot_be_decoded_is_skipped(data):
    with pytest.raises(SkipSample) as caught:
        decode_image(data)
    assert caught.value.null_class == "decode"


def test_a_pixel_bomb_is_skipped_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(SkipSample, match="64 x 48 pixels; the limit is 1000"):
        decode_image(jpeg(64, 48))


@pytest.mark.parametrize(
    ("mode", "max_size", "size"),
    [
        ("keep_aspect", 40, (40, 20)),
        ("keep_aspect", 500, (100, 50)),  # never enlarged
        ("crop", 40, (40, 40)),
        ("stretch", 40, (40, 40)),
        ("stretch", None, (100, 50)),
    ],
)
def test_resize_modes(mode, max_size, size):
    assert resize_image(Image.new("RGB", (100, 50)), mode, max_size).size == size
    assert decode_image(jpeg(100, 50), resize_mode=mode, max_size=max_size).size == size


def test_crop_takes_the_centre_and_stretch_takes_all():
    picture = np.zeros((50, 150, 3), np.uint8)
    picture[:, 50:100] = 255  # the middle third is white
    image = Image.fromarray(picture)
    assert np.asarray(resize_image(image, "crop", 50)).mean() == 255
    assert 70 < np.asarray(resize_image(image, "stretch", 50)).mean() < 100


def test_large_jpegs_are_decoded_small_but_not_smaller_than_asked():
    image = decode_image(jpeg(800, 600), max_size=150)
    assert image.size == (150, 112)
    assert noise(8, 8).shape == (8, 8, 3)
