"""Sizes, times and characters, as both forms of a preview write them."""

from __future__ import annotations

from vlm_dist.preview.samples import Medium

#: Names of the columns of a table of lengths, and the shares that they stand for.
QUANTILES = (("median", 0.5), ("90%", 0.9), ("99%", 0.99), ("longest", 1.0))

_CONTROL_PICTURES = 0x2400
_KIB, _MIB = 2**10, 2**20


def size(pixels: tuple[int, int]) -> str:
    """`640 × 427`."""
    return f"{pixels[0]:,} × {pixels[1]:,}"


def file_size(num_bytes: int) -> str:
    """`12 KiB`."""
    return f"{num_bytes / _MIB:.1f} MiB" if num_bytes >= _MIB else f"{max(1, round(num_bytes / _KIB))} KiB"


def visible(text: str) -> str:
    """Characters that a screen would obey instead of showing them become pictures."""
    return "".join(
        letter
        if letter.isprintable() or letter in "\t\u00a0\u3000\u2028"
        else chr(_CONTROL_PICTURES + ord(letter))
        if ord(letter) < 0x20
        else f"\\u{ord(letter):04x}"
        for letter in text
    )


def file_of(medium: Medium) -> str:
    """`china.jpg`, or `image 2` where it has no name."""
    return visible(medium.name) or f"{medium.kind} {medium.number}"


def describe_medium(medium: Medium) -> str:
    """What became of it: `640 × 427, 53 KiB → 512 × 342 → 504 × 336 pixels`."""
    steps = []
    if medium.file_size is not None:
        steps.append(size(medium.file_size))
    for one in (medium.given_size, medium.model_size):
        if one is not None and (not steps or steps[-1] != size(one)):
            steps.append(size(one))
    told = " → ".join(steps)
    if medium.kind == "video":
        length = f"{medium.seconds:.1f} s" if medium.seconds else "unknown length"
        of = f" of {medium.file_frames:,}" if medium.file_frames else ""
        return f"{told} pixels, {medium.num_frames}{of} frames of {length}, {file_size(medium.num_bytes)}"
    return f"{told} pixels, {file_size(medium.num_bytes)}"
