"""Reads the size of plain JPEG, PNG and WebP pictures from their first bytes, many times faster than by opening them.

Only what needs no judgement is answered here; everything else (EXIF rotation, odd or damaged headers, other formats,
very large pictures) is left to Pillow. So both ways give the same answer, and a test holds them to it.
"""

from __future__ import annotations

import zlib

#: As many bytes as a caller should have ready; longer headers are left to Pillow.
HEAD_BYTES = 2048

_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
#: colour type -> bit depths that PNG allows
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PNG_PLAIN_CHUNKS = {b"gAMA": 4, b"sRGB": 1, b"pHYs": 9, b"PLTE": 3, b"tIME": 7}  # kind -> least length

_SOF = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; Huffman coded
_SOS, _DQT, _APP0, _APP14 = 0xDA, 0xDB, 0xE0, 0xEE
_PLAIN_SEGMENTS = (0xC4, 0xDD, 0xFE)  # Huffman tables, restart interval, comment
_MAX_PIXELS = 50_000_000  # below the size of which Pillow warns


def plain_image_size(head: bytes, num_bytes: int) -> tuple[int, int] | None:
    """Read (width, height) of a picture that shows no reason for doubt.

    Args:
        head: the first bytes of the picture.
        num_bytes: of the whole picture.

    Returns:
        None: ask Pillow.
    """
    if head[:3] == b"\xff\xd8\xff":
        size = _jpeg_size(head)
    elif head[:16] == _PNG_START:
        size = _png_size(head)
    elif head[:4] == b"RIFF" and head[8:15] == b"WEBPVP8":
        size = _webp_size(head, num_bytes)
    else:
        return None
    if size is None or not 0 < size[0] * size[1] < _MAX_PIXELS:
        return None
    return size


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    """Walk over the segments up to the start of the scan; EXIF and whatever is unusual ends the walk."""
    size, layers = None, 0
    position, end = 2, len(head) - 20
    while position < end:
        if head[position] != 0xFF:
            return None
        kind = head[position + 1]
        length = head[position + 2] << 8 | head[position + 3]
        if kind in _SOF:
            layers = head[position + 9]
            if size is not None or head[position + 4] != 8 or layers not in (1, 3, 4) or length != 8 + 3 * layers:
                return None
            size = (head[position + 7] << 8 | head[position + 8], head[position + 5] << 8 | head[position + 6])
        elif kind == _SOS:
            return size if size is not None and length == 6 + 2 * layers else None
        elif kind == _DQT:
            if length != 67 or head[position + 4] > 15:  # one table of 8 bits, as nearly all are
                return None
        elif kind == _APP0:
            if length != 16 or head[position + 4 : position + 8] != b"JFIF":
                return None
        elif kind == _APP14:
            if length != 14 or head[position + 4 : position + 9] != b"Adobe":
                return None
        elif kind not in _PLAIN_SEGMENTS or length < 3:
            return None
        position += 2 + length
    return None


def _png_size(head: bytes) -> tuple[int, int] | None:
    """Read the header chunk, and see that only harmless chunks come before the pixels."""
    if len(head) < 41 or zlib.crc32(head[12:29]) != int.from_bytes(head[29:33], "big"):
        return None
    if head[24] not in _PNG_DEPTHS.get(head[25], ()) or head[26] or head[27] or head[28] > 1:
        return None
    position, end = 33, len(head) - 8
    while position < end:
        kind = head[position + 4 : position + 8]
        if kind == b"IDAT":
            return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
        length = int.from_bytes(head[position : position + 4], "big")
        stop = position + 12 + length
        if (
            length < _PNG_PLAIN_CHUNKS.get(kind, length + 1)
            or stop > end
            or zlib.crc32(head[position + 4 : stop - 4]) != int.from_bytes(head[stop - 4 : stop], "big")
        ):
            return None
        position = stop
    return None


def _webp_size(head: bytes, num_bytes: int) -> tuple[int, int] | None:
    """Read the frame header of a file with one picture and nothing else; one that is cut is for Pillow to judge."""
    length = int.from_bytes(head[16:20], "little")
    if len(head) < 30 or length + 20 + length % 2 != num_bytes or int.from_bytes(head[4:8], "little") + 8 != num_bytes:
        return None
    if head[15] == ord(" "):
        frame = int.from_bytes(head[20:23], "little")
        is_key, profile, is_shown, first_part = not frame & 1, frame >> 1 & 7, frame >> 4 & 1, frame >> 5
        if not (is_key and profile <= 3 and is_shown and first_part < length and head[23:26] == b"\x9d\x01\x2a"):
            return None
        return (head[26] | head[27] << 8) & 0x3FFF, (head[28] | head[29] << 8) & 0x3FFF
    if head[15] == ord("L") and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1) if bits >> 29 == 0 else None
    return None
