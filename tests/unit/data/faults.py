"""Everything that is wrong with data in the field: damaged samples and shards, made here, each with its outcome.

A damaged sample costs its own slot, with a class that says why; a damaged shard is refused when it is indexed.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

Members = Mapping[str, bytes]  # extension -> content

#: What else a sample's outcome may be: None is a sample like any other.
FINE = None


@dataclass(frozen=True)
class SampleFault:
    """One sample.

    Attributes:
        name: its key.
        members: what it is made of.
        outcomes: null classes that are right; FINE among them: it may be used as it is.
    """

    name: str
    members: Members
    outcomes: tuple[str | None, ...]


@dataclass(frozen=True)
class ShardFault:
    """One shard.

    Attributes:
        name: of its file, without the ending.
        content: the bytes of the file.
        refused: a text that the refusal has; None: the shard is fine.
        num_samples: of a shard that is fine.
    """

    name: str
    content: bytes
    refused: str | None
    num_samples: int = 0


def text(question: str = "Which digit is this?", answer: object = "seven") -> bytes:
    return json.dumps({"question": question, "answer": answer}).encode()


def picture(format: str, width: int = 90, height: int = 70, **options: object) -> bytes:
    """A gradient with noise: cheap to make, and not so smooth that damage could hide."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    noise = np.random.default_rng(0).integers(0, 60, (height, width))
    pixels = np.stack([x * 2 + noise, y * 2 + noise, x + y + noise], axis=-1).clip(0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format, **options)
    return stream.getvalue()


def clip(num_frames: int = 16, header_first: bool = False) -> bytes:
    """An mp4 of 2 seconds whose header lies behind the frames, or before them."""
    options = {"movflags": "faststart"} if header_first else {}
    rng = np.random.default_rng(0)
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:  # FFmpeg reads it again to bring the header to the front
        _encode(file.name, options, num_frames, rng)
        return Path(file.name).read_bytes()


def _encode(path: str, options: dict[str, str], num_frames: int, rng: np.random.Generator) -> None:
    with av.open(path, mode="w", format="mp4", options=options) as container:
        video = container.add_stream("libx264", rate=8, options={"crf": "20", "threads": "1", "g": "4"})
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for _ in range(num_frames):
            frame = rng.integers(0, 256, (48, 64, 3)).astype(np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))


def rot(data: bytes, start: float = 0.3, stop: float = 0.9, every: int = 97) -> bytes:
    """Flip a bit of every so many bytes between two places, as a failing disk does."""
    rotten = bytearray(data)
    for place in range(int(len(data) * start), int(len(data) * stop), every):
        rotten[place] ^= 1 << (place % 8)
    return bytes(rotten)


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG of a few bytes that claims to be large: decoded it would take 10 GB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


HTML = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>gone</body></html>"


def sample_faults() -> Iterator[SampleFault]:
    """Samples with something wrong in them; their neighbours are fine."""
    yield from _images()
    yield from _videos()
    yield from _texts()


def _images() -> Iterator[SampleFault]:
    def image(name: str, extension: str, content: bytes, *outcomes: str | None) -> SampleFault:
        return SampleFault(name, {extension: content, "json": text()}, outcomes)

    for format, extension in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        whole = picture(format)
        yield image(f"{extension}-whole", extension, whole, FINE)
        for share in (0.02, 0.3, 0.6, 0.95):
            yield image(
                f"{extension}-cut-{share:g}".replace(".", "_"), extension, whole[: int(len(whole) * share)], "decode"
            )
        yield image(f"{extension}-empty", extension, b"", "decode")
        yield image(f"{extension}-zeros", extension, bytes(len(whole)), "decode")
        # JPEG and WebP have no checksums: most rotten bits give a picture with wrong colours
        outcomes = ("decode",) if format == "PNG" else ("decode", FINE)
        yield image(f"{extension}-rotten", extension, rot(whole), *outcomes)
    yield image("html", "jpg", HTML, "decode")
    yield image("bomb", "png", bomb(), "decode")
    yield image("png-named-jpg", "jpg", picture("PNG"), FINE)
    yield image("jpg-named-png", "png", picture("JPEG"), FINE)
    yield image("mp4-named-jpg", "jpg", clip(), "decode")
    yield image("postscript-named-jpg", "jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "decode")
    yield image("one-line", "png", picture("PNG", 3000, 1), "bad_sample", "decode", FINE)


def _videos() -> Iterator[SampleFault]:
    def video(name: str, content: bytes, *outcomes: str | None) -> SampleFault:
        return SampleFault(name, {"mp4": content, "json": text("Which digits?")}, outcomes)

    header_last, header_first = clip(), clip(header_first=True)
    yield video("mp4-whole", header_last, FINE)
    yield video("mp4-header-first", header_first, FINE)
    yield video("mp4-empty", b"", "decode")
    yield video("mp4-zeros", bytes(5000), "decode")
    yield video("html-named-mp4", HTML, "decode")
    yield video("jpg-named-mp4", picture("JPEG"), "decode", FINE)
    for percent in (1, 10, 25, 50, 75, 90, 99):
        # the index of the frames is at the end: nothing of a cut file can be found
        yield video(f"mp4-cut-{percent}", header_last[: len(header_last) * percent // 100], "decode")
    for percent in (1, 25, 50, 75, 90, 99):
        # the index is there, frames are missing: where the decoder still has frames to give it may
        yield video(f"mp4-first-cut-{percent}", header_first[: len(header_first) * percent // 100], "decode", FINE)
    yield video("mp4-rotten", rot(header_last, 0.1, 0.7), "decode", FINE)
    yield video("mp4-rotten-header", rot(header_last, 0.9, 1.0, every=11), "decode", FINE)


def _texts() -> Iterator[SampleFault]:
    def record(name: str, content: bytes, *outcomes: str | None) -> SampleFault:
        return SampleFault(name, {"png": picture("PNG", 40, 40), "json": content}, outcomes or ("bad_sample",))

    yield record("json-cut", text()[:-5])
    yield record("json-empty", b"")
    yield record("json-not-utf8", text().replace(b"seven", b"s\xe9ven"))
    yield record("json-binary", bytes(range(256)))
    yield record("json-list", b"[1, 2]")
    yield record("json-nested", b"[" * 200_000)
    yield record("json-without-answer", b'{"question": "q"}')
    yield record("json-null-answer", b'{"question": "q", "answer": null}')
    yield record("json-half-a-character", b'{"question": "q", "answer": "\\ud800"}', "bad_sample", FINE)
    yield record("json-number", text(answer=7), FINE, "bad_sample")


def sound(count: int) -> Iterator[tuple[str, Members]]:
    """Samples with nothing wrong in them: pictures and answers of different sizes."""
    rng = np.random.default_rng(1)
    for number in range(count):
        width, height = (int(value) for value in rng.integers(30, 90, 2))
        answer = "digit " * int(rng.integers(0, 5)) + str(number % 10)
        yield f"sound{number:05d}", {"png": picture("PNG", width, height), "json": text(answer=answer)}


def write_tar(path: Path, samples: Iterable[tuple[str, Members]]) -> Path:
    """Write samples as they are, with no questions asked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        tar_bytes((f"{key}.{extension}", data) for key, members in samples for extension, data in members.items())
    )
    return path


def tar_bytes(files: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def shard_faults() -> Iterator[ShardFault]:
    """Shards with something wrong in them, and two that only look so."""
    png = picture("PNG", 40, 40)
    three = [(f"{key}.{ending}", data) for key in "abc" for ending, data in (("png", png), ("json", text()))]
    whole = tar_bytes(three)
    yield ShardFault("whole", whole, None, 3)
    for share in (0.3, 0.6, 0.8):
        yield ShardFault(f"cut-{share:g}".replace(".", "_"), whole[: int(len(whole) * share)], "truncated")
    yield ShardFault("cut-before-the-end", tar_without_end(three), "truncated")
    yield ShardFault("empty-file", b"", "")
    yield ShardFault("empty-tar", tar_bytes([]), "no samples")
    yield ShardFault("rotten-header", _rot_a_header(whole), "")
    yield ShardFault("compressed", gzip.compress(whole), "compressed")
    yield ShardFault("html", HTML * 20, "")
    yield ShardFault("missing-member", tar_bytes([*three, ("d.png", png)]), "json")
    yield ShardFault("duplicate-key", tar_bytes([*three, *three[:2]]), "'a'")
    yield ShardFault("duplicate-member", tar_bytes([*three[:1], *three]), "'a'")
    dotted = [(name.replace("a.", "img_1.5x.").replace("b.", "img_1.7x."), data) for name, data in three]
    yield ShardFault("dotted-key", tar_bytes(dotted), "dot")
    long = [("folder" * 12 + "/" + "long" * 40 + name, data) for name, data in three]
    yield ShardFault("gnu-long-names", tar_bytes(long, tarfile.GNU_FORMAT), None, 3)
    yield ShardFault("pax-long-names", tar_bytes(long, tarfile.PAX_FORMAT), None, 3)
    korean = [(f"숫자-{name}", data) for name, data in three]
    yield ShardFault("pax-korean-names", tar_bytes(korean, tarfile.PAX_FORMAT), None, 3)


def tar_without_end(files: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar that was cut exactly between two members: nothing but the missing end tells."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        end = archive.offset
    return stream.getvalue()[:end]


def _rot_a_header(whole: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        start = archive.getmembers()[2].offset
    rotten = bytearray(whole)
    rotten[start + 124 : start + 136] = b"zzzzzzzzzzz\0"
    return bytes(rotten)
