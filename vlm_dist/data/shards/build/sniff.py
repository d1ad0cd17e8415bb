"""Tells the format of an image or video by its first bytes, not by its name."""

from __future__ import annotations

_STARTS = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "jp2"),
    (b"\xffO\xffQ", "jp2"),
    (b"\x1aE\xdf\xa3", "mkv"),
    (b"\0\0\x01\xba", "mpg"),
    (b"\0\0\x01\xb3", "mpg"),
    (b"FLV\x01", "flv"),
    (b"0&\xb2u\x8ef\xcf\x11", "wmv"),
    (b"OggS", "ogv"),
)
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
_TS_PACKET_BYTES = 188


def sniff_format(data: bytes) -> str | None:
    """Return the extension that files of this content have.

    Returns:
        One that `member_kind` takes for an image or a video; None for anything else.
    """
    for start, extension in _STARTS:
        if data.startswith(start):
            return "webm" if extension == "mkv" and b"webm" in data[:64] else extension
    if data[:4] == b"RIFF":
        return {b"WEBP": "webp", b"AVI ": "avi"}.get(data[8:12])
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        return "avif"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"hevc"):
        return None  # photographs of telephones, which Pillow does not read by itself
    if data[4:8] in _MP4_BOXES:
        return "mov" if data[8:12] == b"qt  " else "mp4"
    if data[:2] == b"BM" and data[6:10] == b"\0\0\0\0":
        return "bmp"
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3] in (b"\n", b" ", b"\t", b"\r"):
        return "ppm"
    if data[:1] == b"G" and data[_TS_PACKET_BYTES : _TS_PACKET_BYTES + 1] == b"G":
        return "ts"
    return None


def describe_content(data: bytes) -> str:
    """Say what a file is that is no image and no video."""
    if not data:
        return "an empty file"
    start = data[:64].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page"
    if data[4:8] == b"ftyp":
        return f"a file of the brand {data[8:12].decode('ascii', 'replace')!r}; convert it to JPEG, PNG or mp4"
    return f"a file that starts with {data[:12]!r}"
