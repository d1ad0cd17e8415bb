"""Media that come from files of their own: their bytes remember which, so that errors of decoding can tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vlm_dist.errors import SkipSample


class NamedBytes(bytes):
    """An encoded image or video, and the path that its record names.

    Attributes:
        path: as a person looks for it.
    """

    path: str

    @classmethod
    def of(cls, data: bytes, path: str) -> NamedBytes:
        """Name some bytes; costs one copy of them."""
        named = cls(data)
        named.path = path
        return named


@contextmanager
def naming(data: bytes) -> Iterator[None]:
    """Name the file in whatever makes its sample useless."""
    try:
        yield
    except SkipSample as skip:
        if not isinstance(data, NamedBytes):
            raise
        raise SkipSample(skip.null_class, f"{data.path}: {skip.message}") from skip
