"""URLs of shards: what is shown of them, and what tells one from another."""

from __future__ import annotations

import hashlib
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from vlm_dist.config.masking import is_secret_name


def scheme_of(url: str) -> str:
    """Return `http`, `https`, `s3`, `gs`, …"""
    return url.partition("://")[0].lower()


def shown(url: str) -> str:
    """Return a URL without what must not be in a log: user, password and query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def identity(url: str) -> str:
    """Return what tells one object from another: signatures and passwords change while the object stays."""
    parts = urlsplit(url)
    query = [
        (name, value) for name, value in parse_qsl(parts.query, keep_blank_values=True) if not is_secret_name(name)
    ]
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, urlencode(query), ""))


def file_name(url: str) -> str:
    """Return the last part of the path."""
    return urlsplit(url).path.rsplit("/", 1)[-1]


def sibling(url: str, name: str) -> str:
    """Return the URL of another file in the same directory, with the same query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rpartition("/")[0] + "/" + name, parts.query, ""))


def with_suffix(url: str, suffix: str) -> str:
    """Return the URL of the file of this name and a suffix."""
    return sibling(url, file_name(url) + suffix)


def copy_key(url: str, index_digest: str) -> str:
    """Name the copy of a shard: the same for all processes, another where the content is another."""
    return f"{digest_of(identity(url) + index_digest)}-{file_name(url)[-100:]}"


def digest_of(text: str) -> str:
    """Return a short name for a text, for use in file names."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
