"""Two photographs, and files of many kinds made of them."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

CHINA, FLOWER = (np.asarray(picture) for picture in load_sample_images().images)  # real photographs, 640 x 427


def encode_pan(container: str) -> bytes:
    """3 s of h264 at 320 x 240: a window that moves over a photograph."""
    stream = io.BytesIO()
    with av.open(stream, mode="w", format=container) as out:
        video = out.add_stream("libx264", rate=Fraction(15), options={"crf": "28", "threads": "1"})
        video.width, video.height, video.pix_fmt = 320, 240, "yuv420p"
        for number in range(45):
            left = number * 7
            frame = np.ascontiguousarray(CHINA[100:340, left : left + 320])
            out.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(video.encode(None))
    return stream.getvalue()


def write_media(directory: Path) -> None:
    directory.mkdir()
    china = Image.fromarray(CHINA)
    china.save(directory / "china.jpg", quality=85)
    Image.fromarray(FLOWER).save(directory / "flower.jpg", quality=85)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    china.rotate(90, expand=True).save(directory / "upright.jpg", exif=exif)
    china.convert("CMYK").save(directory / "cmyk.jpg")
    china.quantize(16).save(directory / "palette.png")
    china.resize((3000, 2000)).save(directory / "large.jpg", quality=50)
    china.resize((6000, 200)).save(directory / "wide.jpg", quality=50)
    for container, name in (("mp4", "pan.mp4"), ("avi", "pan.avi")):
        (directory / name).write_bytes(encode_pan(container))
