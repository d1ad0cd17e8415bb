"""Keys of samples: legal for webdataset and the index, and unique."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

from vlm_dist.data.shards.build.bad_records import BadRecord

_MAX_BYTES = 80  # with the member's extension a name of at most 100 needs no extended tar header
_ILLEGAL = re.compile(r"[.\s\x00-\x1f\x7f\\]+")


def numbered_key(number: int) -> str:
    """Name a sample by its record's place in the source."""
    return f"{number:09d}"


def clean_key(value: Any) -> str:
    """Make a legal key of a value: dots (the key ends at the first) and blanks become `_`.

    Raises:
        BadRecord: ("key") nothing is left of it, or it is no text and no number.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRecord("key", f"the key is {value!r}, expected a text or a whole number")
    parts = [_ILLEGAL.sub("_", part.strip()) for part in str(value).split("/")]
    key = "/".join(part for part in parts if part.strip("_"))
    base = key.rsplit("/", 1)[-1]
    if not base:
        raise BadRecord("key", f"the key is {value!r}, of which nothing can be used")
    if base.startswith("__"):  # names of webdataset's own
        key = key[: len(key) - len(base)] + base.lstrip("_")
    data = key.encode("utf-8", "replace")
    if len(data) > _MAX_BYTES:
        digest = hashlib.sha256(data).hexdigest()[:16]
        key = data[: _MAX_BYTES - 17].decode("utf-8", "ignore") + "-" + digest
    return key


class UniqueKeys:
    """Tells keys that come again apart: `a`, `a_2`, `a_3`, … in the order in which they come.

    What it gives depends only on the keys before, so that a build that is resumed goes on with the same keys.

    Args:
        taken: keys that are written already.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        # half of a digest per key: a collision, once in 10^9 samples, costs no more than a suffix
        self._taken = {_digest(key) for key in taken}
        self._next: dict[int, int] = {}

    def unique(self, key: str) -> str:
        """Return the key, with a number behind it if it was there before."""
        first = digest = _digest(key)
        candidate = key
        while digest in self._taken:
            number = self._next.get(first, 2)
            self._next[first] = number + 1
            candidate = f"{key}_{number}"
            digest = _digest(candidate)
        self._taken.add(digest)
        return candidate


def _digest(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
