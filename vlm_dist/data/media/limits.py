"""Which pictures are decoded at all."""

from __future__ import annotations

#: A picture above this is an error of the data, or an attack: 179 million pixels are half a gigabyte of RGB.
MAX_IMAGE_PIXELS = 178_956_970

#: Raster formats alone: Pillow would also hand EPS to Ghostscript, a program, with bytes that nobody vouches for.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
