"""Images: upright, RGB, of the configured size; damaged ones are skipped, never raised as anything else."""

import io
import struct
import zlib

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.unit.data.samples import jpeg, noise, png
from vlm_dist.data.media import images
from vlm_dist.data.media.images import as_pil, decode_image, image_size, resize_image
from vlm_dist.errors import SkipSample


def decoded(data, **options):
    return as_pil(decode_image(data, **options))


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
    image = decoded(stream.getvalue())
    assert image.size == (40, 24)
    assert image.getpixel((2, 2)) == (255, 0, 0)
    assert image.getpixel((38, 22)) == (255, 255, 255)


def test_every_mode_becomes_rgb():
    grey16 = Image.fromarray(np.full((4, 4), 65535 // 2, np.uint16))
    assert decoded(png(grey16)).getpixel((0, 0)) == (127, 127, 127)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decoded(png(clear)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("RGB", (4, 4), (0, 0, 255)).convert("P")
    assert decoded(png(palette)).getpixel((0, 0)) == (0, 0, 255)
    assert decoded(png(Image.new("1", (4, 4), 1))).getpixel((0, 0)) == (255, 255, 255)
    assert decoded(png(Image.new("LA", (4, 4), (7, 255)))).getpixel((0, 0)) == (7, 7, 7)
    stream = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(stream, "JPEG")
    red, green, blue = decoded(stream.getvalue()).getpixel((0, 0))
    assert red > 240
    assert max(green, blue) < 15
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(stream, "TIFF")
    assert decoded(stream.getvalue()).getpixel((0, 0)) == (128, 128, 128)


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
    assert image_size(decode_image(jpeg(100, 50), resize_mode=mode, max_size=max_size)) == size


def test_crop_takes_the_centre_and_stretch_takes_all():
    picture = np.zeros((50, 150, 3), np.uint8)
    picture[:, 50:100] = 255  # the middle third is white
    image = Image.fromarray(picture)
    assert np.asarray(resize_image(image, "crop", 50)).mean() == 255
    assert 70 < np.asarray(resize_image(image, "stretch", 50)).mean() < 100


def test_what_is_resized_is_within_a_level_of_pillow():
    smooth = Image.fromarray(noise(16, 12)).resize((640, 480), Image.Resampling.BICUBIC)
    reference = np.asarray(smooth.resize((150, 112), Image.Resampling.BICUBIC)).astype(int)
    ours = np.asarray(decoded(png(smooth), max_size=150)).astype(int)
    assert ours.shape == reference.shape
    assert np.abs(ours - reference).max() <= 1
    square = np.asarray(smooth.crop((80, 0, 560, 480)).resize((96, 96), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.asarray(decoded(png(smooth), max_size=96, resize_mode="crop")).astype(int) - square).max() <= 1


def test_the_content_tells_the_format_and_a_page_is_no_picture():
    assert image_size(decode_image(jpeg(40, 30))) == (40, 30)
    with pytest.raises(SkipSample, match="in no known format"):
        decode_image(b"<!DOCTYPE html><html><body>404 Not Found</body></html>")


def test_no_program_is_started_for_a_picture():
    with pytest.raises(SkipSample):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(/tmp/x) (w) file\n")


def _png_with(*chunks):
    head, rest = png(Image.new("RGB", (8, 8)))[:33], png(Image.new("RGB", (8, 8)))[33:]
    made = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return head + b"".join(made) + rest


def gif_of(image):
    stream = io.BytesIO()
    image.save(stream, "GIF")
    return stream.getvalue()


def test_bombs_of_few_bytes_cost_little():
    text = _png_with((b"zTXt", b"k\0\0" + zlib.compress(bytes(300_000_000), 9)))  # 300 MB of text in 300 KB
    gif = bytearray(gif_of(Image.new("P", (8, 8))))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    wide = bytearray(jpeg(64, 48))
    frame = wide.index(b"\xff\xc0") + 5
    wide[frame : frame + 4] = struct.pack(">HH", 65000, 65000)
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", 2)
    tiff += struct.pack("<HHII", 256, 4, 1, 100_000) + struct.pack("<HHII", 257, 4, 0xFFFFFFFF, 8) + bytes(4)
    before = psutil.Process().memory_info().rss
    for bomb in (text, bytes(gif), bytes(wide), tiff):
        with pytest.raises(SkipSample):
            decode_image(bomb)
    assert psutil.Process().memory_info().rss - before < 150e6
