"""Which shards some URLs mean."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from vlm_dist.data.index.manifest import MANIFEST_NAME
from vlm_dist.data.storage.find import expand_braces
from vlm_dist.data.storage.remote.store import RemoteObject, check_known, store_for
from vlm_dist.data.storage.remote.urls import file_name, scheme_of, shown, sibling
from vlm_dist.errors import DataError

_MAGIC = ("*", "[")


def list_shards(where: str, patterns: Sequence[str]) -> dict[str, RemoteObject]:
    """List the shards that some URLs mean, in their order; what a server says of them where it has listed them.

    Args:
        where: names the source in errors.
        patterns: URLs of shards or of directories, with braces; for buckets also globs.

    Raises:
        DataError: nothing is found, or a server cannot say what it has.
    """
    check_known(patterns)
    found: dict[str, RemoteObject] = {}
    for pattern in patterns:
        for url in expand_braces(pattern):
            found.update(_shards_of(where, url))
    if not found:
        raise DataError(f"{where}: no .tar objects found for {', '.join(map(shown, patterns))}")
    return found


def _shards_of(where: str, url: str) -> Iterator[tuple[str, RemoteObject]]:
    has_magic = scheme_of(url) not in ("http", "https") and any(letter in url for letter in _MAGIC)
    if file_name(url).endswith(".tar") and not has_magic:
        yield url, RemoteObject(None, "")
        return
    store = store_for(url)
    listed = store.list(url)
    if listed is not None:
        yield from ((name, what) for name, what in listed.items() if name.endswith(".tar"))
        return
    base = url if url.endswith("/") or "?" in url else url + "/"
    document = store.read_whole(sibling(base, MANIFEST_NAME))
    if document is None:
        raise DataError(
            f"{where}: {shown(url)} names no .tar file, and a web server cannot list what it has; name the shards, "
            f"e.g. {shown(base)}train-{{000000..000099}}.tar, or put the {MANIFEST_NAME} of `vlm-dist shards` there"
        )
    try:
        names = [str(shard["name"]) for shard in json.loads(document)["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: {shown(sibling(base, MANIFEST_NAME))} is no manifest ({error!r})") from error
    for name in names:
        yield sibling(base, name), RemoteObject(None, "")
